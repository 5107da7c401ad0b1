"""How sure a figure is: the bootstrap over prompts, one set of draws for everything that is compared.

A draw is a weight for each prompt: how often it was drawn. All routers are scored on the same draws, so that the
differences between two of them are paired. Prompts that are near-duplicates of each other are drawn together.
"""

# N prompts, B draws

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


class Interval(NamedTuple):
    """A figure and its confidence interval; NaN where it has no value."""

    value: float
    low: float
    high: float


def bootstrap_weights(
    num_prompts: int, num_draws: int, seed: int = 0, clusters: ArrayLike | None = None
) -> NDArray[np.uint16]:
    """How often each prompt was drawn, (B, N): each draw takes as many clusters as there are, with replacement.

    `clusters` (N,) names the cluster of each prompt; by default each is its own. Source: Efron (1979); Davison and
    Hinkley (1997), 3.8, for clusters.
    """
    rng = np.random.default_rng(seed)
    names = np.arange(num_prompts) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(names.max(initial=-1)) + 1
    counts = np.empty((num_draws, num_prompts), np.uint16)
    for draw in range(num_draws):
        drawn = rng.integers(0, max(num_clusters, 1), num_clusters)
        counts[draw] = np.bincount(drawn, minlength=num_clusters)[names]
    return counts


def interval(value: float, drawn: ArrayLike, level: float = LEVEL) -> Interval:
    """The interval of a figure with values `drawn` (B,) in the bootstrap: their percentiles (Efron, 1979).

    Draws in which the figure has no value are left out. For an expected calibration error it would be wrong: noise in
    its bins always adds to it, in a draw once more.
    """
    draws = np.asarray(drawn, np.float64)
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(draws):
        return Interval(float(value), float("nan"), float("nan"))
    # Of B draws, the k-th is taken for the quantile k / (B + 1): the usual (k - 1) / (B - 1) is a little too narrow.
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], method="weibull")
    return Interval(float(value), float(low), float(high))
