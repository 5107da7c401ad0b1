"""Samples prompts to label: at random, stratified, or where the router is least certain which target to choose.

Draws are hashes of the prompt's content, so that a larger sample includes every smaller one.
"""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefill_router.corpus.split import mixed
from prefill_router.query_log.estimates import Contents

# Scale of the margin between the two best targets. Mixing margins and chance at this scale learns the most per label
# (tests/benchmarks/LOG.md).
_MARGIN_SCALE = 0.1


def chances(contents: Contents) -> NDArray[np.float64]:
    """Returns a pseudorandom number in [0, 1) for each prompt (N,)."""
    return mixed(contents[:, 0] ^ contents[:, 1]) / 2.0**64


def at_random(contents: Contents, size: int) -> NDArray[np.int64]:
    """Draws `size` of N prompts, or all if there are fewer."""
    return np.argsort(chances(contents), kind="stable")[:size]


def stratified(contents: Contents, strata: Sequence[str], size: int) -> NDArray[np.int64]:
    """Draws equally many prompts of each stratum (N,); the others make up for a stratum that is too small."""
    names = np.unique(np.asarray(strata, object).astype(str), return_inverse=True)[1]
    order = np.argsort(chances(contents), kind="stable")
    # Rank of each prompt within its stratum: sorting by it takes one prompt of each stratum per round.
    place = np.empty(len(order), np.int64)
    by_stratum = order[np.argsort(names[order], kind="stable")]
    sorted_names = names[by_stratum]
    starts = np.searchsorted(sorted_names, sorted_names)
    place[by_stratum] = np.arange(len(order)) - starts
    return np.lexsort((chances(contents), place))[:size]


def active(contents: Contents, p_correct: NDArray[np.floating], size: int) -> NDArray[np.int64]:
    """Draws `size` prompts, preferring small margins in P(correct) (N, T) between the two best targets.

    Chance is mixed in, because the smallest margins alone would be too similar prompts. Source: margin sampling
    (Scheffer, Decomain and Wrobel, 2001).
    """
    if p_correct.shape[1] < 2:
        return at_random(contents, size)
    best = np.sort(p_correct, axis=1)
    margins = (best[:, -1] - best[:, -2]).astype(np.float64)
    return np.argsort(-chances(contents) * np.exp(-margins / _MARGIN_SCALE), kind="stable")[:size]
