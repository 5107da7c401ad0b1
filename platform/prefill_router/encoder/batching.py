"""Token-budget batches: prompts of similar length together, so that padding is small and a batch's work is bounded."""

# N prompts

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def token_budget_batches(
    lengths: Sequence[int], budget_tokens: int, *, is_padded: bool = True, is_mixed: bool = True
) -> Iterator[NDArray[np.int64]]:
    """Yields index arrays that cover every prompt once, longest first.

    A batch holds at most `budget_tokens`, once it is padded to its longest prompt where `is_padded`; a longer prompt
    gets a batch of its own. Unless `is_mixed`, all prompts of a batch are of one length.
    """
    descending = np.asarray(lengths, np.int64)
    order = np.argsort(descending, kind="stable")[::-1]
    descending = descending[order]
    ends = np.cumsum(descending)  # (N,)
    start = 0
    while start < len(order):
        if is_padded:
            size = budget_tokens // max(1, descending[start])
        else:
            size = np.searchsorted(ends, ends[start] - descending[start] + budget_tokens, side="right") - start
        if not is_mixed:
            size = min(size, np.searchsorted(-descending, -descending[start], side="right") - start)
        stop = start + max(1, int(size))
        yield order[start:stop]
        start = stop
