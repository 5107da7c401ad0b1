from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.encoder.batching import token_budget_batches


@given(st.lists(st.integers(0, 500), max_size=200), st.integers(1, 1000), st.booleans(), st.booleans())
def test_batches_cover_every_prompt_once_within_the_budget(
    lengths: list[int], budget: int, is_padded: bool, is_mixed: bool
) -> None:
    batches = list(token_budget_batches(lengths, budget, is_padded=is_padded, is_mixed=is_mixed))
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert len(batch) == 1 or (max(own) * len(own) if is_padded else sum(own)) <= budget
        assert is_mixed or len(set(own)) == 1


def test_unpadded_batches_are_full() -> None:
    """The next prompt would not fit."""
    lengths = [300, 100, 90, 60, 40, 2]
    assert [[lengths[i] for i in b] for b in token_budget_batches(lengths, 512, is_padded=False)] == [
        [300, 100, 90],
        [60, 40, 2],
    ]


def test_similar_lengths_share_a_batch() -> None:
    lengths = [100, 1, 99, 2, 98, 3]
    first, second = token_budget_batches(lengths, 300)
    assert sorted(lengths[i] for i in first) == [98, 99, 100]
    assert sorted(lengths[i] for i in second) == [1, 2, 3]
