from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.batching import token_budget_batches


@given(st.lists(st.integers(0, 500), max_size=200), st.integers(1, 1000))
def test_every_prompt_once_and_no_batch_over_budget(lengths: list[int], budget: int) -> None:
    batches = list(token_budget_batches(lengths, budget))
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


def test_similar_lengths_stand_together() -> None:
    lengths = [100, 1, 99, 2, 98, 3]
    first, second = token_budget_batches(lengths, 300)
    assert sorted(lengths[i] for i in first) == [98, 99, 100]
    assert sorted(lengths[i] for i in second) == [1, 2, 3]
