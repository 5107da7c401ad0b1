"""Token-budget batching: groups prompts of similar length, which limits both padding and the work per batch."""

# N prompts

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def token_budget_batches(
    lengths: Sequence[int], budget_tokens: int, *, is_padded: bool = True, is_mixed: bool = True
) -> Iterator[NDArray[np.int64]]:
    """Yields arrays of prompt indices that cover every prompt once, longest first.

    A batch holds at most `budget_tokens`, counting padding to its longest prompt if `is_padded`. A prompt over the
    budget gets its own batch. Unless `is_mixed`, all prompts of a batch have the same length.
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
