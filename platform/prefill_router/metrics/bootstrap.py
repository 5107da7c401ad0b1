"""Confidence intervals from a bootstrap over prompts.

A draw assigns each prompt a weight: the number of times it was drawn. All routers are scored on the same draws, so
their differences are paired. Near-duplicate prompts form a cluster and are drawn together.
"""

# N prompts, B draws

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


class Interval(NamedTuple):
    """A value and its confidence interval; NaN if undefined."""

    value: float
    low: float
    high: float

    @property
    def negated(self) -> Interval:
        """The interval of the negative value."""
        return Interval(-self.value, -self.high, -self.low)


def bootstrap_weights(
    num_prompts: int, num_draws: int, seed: int = 0, clusters: ArrayLike | None = None, *, all_first: bool = False
) -> NDArray[np.uint16]:
    """The number of times (B, N) that each draw takes each prompt.

    A draw samples as many clusters as there are, with replacement. `clusters` (N,) holds the cluster of each prompt; by
    default each prompt is its own cluster. `all_first` prepends a draw that takes every prompt once. Source: Efron
    (1979); Davison and Hinkley (1997), 3.8, for clusters.
    """
    rng = np.random.default_rng(seed)
    names = np.arange(num_prompts) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    num_clusters = int(names.max(initial=-1)) + 1
    counts = np.ones((1 + num_draws, num_prompts), np.uint16)
    for draw in counts[1:]:
        drawn = rng.integers(0, max(num_clusters, 1), num_clusters)
        draw[:] = np.bincount(drawn, minlength=num_clusters)[names]
    return counts if all_first else counts[1:]


def interval(value: float, drawn: ArrayLike, level: float = LEVEL) -> Interval:
    """The percentile interval (Efron, 1979) of a statistic with bootstrap values `drawn` (B,); ignores NaN draws.

    Not valid for the expected calibration error: noise in its bins always increases it, and resampling adds noise.
    """
    draws = np.asarray(drawn, np.float64)
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(draws):
        return Interval(float(value), float("nan"), float("nan"))
    # "weibull" takes the k-th of B draws as the quantile k / (B + 1); the default (k - 1) / (B - 1) is too narrow.
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], method="weibull")
    return Interval(float(value), float(low), float(high))


def interval_from_draws(values: ArrayLike) -> Interval:
    """The interval of values (B,) on the draws of `bootstrap_weights` with `all_first`."""
    array = np.asarray(values, np.float64)
    return interval(array[0], array[1:])
