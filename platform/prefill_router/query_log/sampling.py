"""Which prompts to pay for: by chance, alike of each kind, or where a router can hardly tell which target to choose.

What is drawn is drawn by a hash of the prompt, so that a larger sample holds a smaller one.
"""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefill_router.corpus.split import mixed
from prefill_router.query_log.estimates import Contents

# Margins between the two best targets that are a sure choice. LOG: between margins alone and chance alone, this learns
# the most from a label.
_SURE = 0.1


def chances(contents: Contents) -> NDArray[np.float64]:
    """A number in [0, 1) for each prompt (N,), as if by chance."""
    return mixed(contents[:, 0] ^ contents[:, 1]) / 2.0**64


def at_random(contents: Contents, size: int) -> NDArray[np.int64]:
    """`size` of N prompts, or all."""
    return np.argsort(chances(contents), kind="stable")[:size]


def stratified(contents: Contents, strata: Sequence[str], size: int) -> NDArray[np.int64]:
    """As many of each stratum (N,) as if all had the same number of prompts; what a small one lacks, others give."""
    names = np.unique(np.asarray(strata, object).astype(str), return_inverse=True)[1]
    order = np.argsort(chances(contents), kind="stable")
    # The place of each prompt within its stratum, so that rounds take one of each.
    place = np.empty(len(order), np.int64)
    by_stratum = order[np.argsort(names[order], kind="stable")]
    sorted_names = names[by_stratum]
    starts = np.searchsorted(sorted_names, sorted_names)
    place[by_stratum] = np.arange(len(order)) - starts
    return np.lexsort((chances(contents), place))[:size]


def active(contents: Contents, p_correct: NDArray[np.floating], size: int) -> NDArray[np.int64]:
    """`size` of the prompts where P(correct) (N, T) of the two best targets is nearest, with chance mixed in.

    The nearest alone would be all of one kind. Source: margin sampling (Scheffer, Decomain and Wrobel, 2001).
    """
    if p_correct.shape[1] < 2:
        return at_random(contents, size)
    best = np.sort(p_correct, axis=1)
    margins = (best[:, -1] - best[:, -2]).astype(np.float64)
    return np.argsort(-chances(contents) * np.exp(-margins / _SURE), kind="stable")[:size]
