"""Token-budget batches: prompts of similar length together, so that padding is small and a batch's work is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def token_budget_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yields index arrays that cover every prompt once, longest first.

    A batch padded to its longest prompt holds at most `budget_tokens`; a longer prompt gets a batch of its own.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = max(1, budget_tokens // longest)
        yield order[start : start + size]
        start += size
