"""The figures by which other projects rank routers, so that ours can be laid beside theirs."""

# N prompts, M points, B weightings

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.metrics.curve import Points
from prefill_router.metrics.discrimination import once, ratio

Array = NDArray[np.float64]

ARENA_BETA = 0.1
ARENA_COSTS = (0.0044, 200.0)  # USD for 1,000 prompts


def average_performance_gap_recovered(strong: ArrayLike, weak: ArrayLike, score: ArrayLike) -> float:
    """APGR: the gap between a weak and a strong target that is recovered, mean over all shares of calls to the strong.

    `strong` and `weak` (N,) are outcomes, and `score` (N,) is higher where the strong one is wanted more. The integral
    that Ong et al. (RouteLLM, 2024) take at ten shares is exact here; prompts of equal score come in any order. NaN
    where the strong target is not the better one.
    """
    gap = GapRecovered(strong, weak, score)
    return float(gap.average(once(score))[0])


def call_performance_threshold(strong: ArrayLike, weak: ArrayLike, score: ArrayLike, recovered: float) -> float:
    """CPT: the least share of calls to the strong target that recovers this share of the gap. Arguments as above.

    Source: Ong et al. (RouteLLM, 2024). NaN where the strong target is not the better one.
    """
    gap = GapRecovered(strong, weak, score)
    return float(gap.threshold(once(score), recovered)[0])


class GapRecovered:
    """The share of the gap that is recovered as calls go to the strong target, for many weightings of the prompts."""

    def __init__(self, strong: ArrayLike, weak: ArrayLike, score: ArrayLike) -> None:
        scores = np.asarray(score, np.float64)
        self._order = np.argsort(-scores, kind="stable")
        self._gain = (np.asarray(strong, np.float64) - np.asarray(weak, np.float64))[self._order]
        self._last = np.cumsum(np.unique(-scores, return_counts=True)[1]) - 1  # of each distinct score

    def average(self, weights_BN: Array) -> Array:
        return np.asarray([np.trapezoid(gap, calls) for calls, gap in self._curves(weights_BN)])

    def threshold(self, weights_BN: Array, recovered: float) -> Array:
        found = []
        for calls, gap in self._curves(weights_BN):
            reached = np.flatnonzero(gap >= recovered - 1e-12)
            found.append(calls[reached[0]] if len(reached) else np.nan)
        return np.asarray(found)

    def _curves(self, weights_BN: Array) -> Iterator[tuple[Array, Array]]:
        """Shares of calls and of the gap, both from 0, of each weighting."""
        weights = weights_BN[:, self._order]
        calls, gain = (np.cumsum(values, axis=1)[:, self._last] for values in (weights, weights * self._gain))
        for calls_M, gain_M in zip(calls, gain, strict=True):
            shares = (ratio(values, values[-1]) for values in (calls_M, gain_M))
            yield tuple(np.concatenate([[0.0], share]) for share in shares)  # type: ignore[misc]


def average_improvement_in_quality(curve: ArrayLike, c_min: float, c_max: float) -> float:
    """AIQ: the mean, over the costs [c_min, c_max], of the accuracy on the curve's non-decreasing convex hull.

    `curve` (M, 2) is of (cost, accuracy). The hull begins at the cheapest point and keeps its last accuracy to the
    right of its dearest; a point between two others can be had by mixing them at random. 0 for an empty range, NaN for
    an empty curve. Source: Hu et al. (RouterBench, 2024).
    """
    points = np.asarray(curve, np.float64).reshape(-1, 2)
    if not len(points):
        return float("nan")
    span = c_max - c_min
    if not span > 0.0:
        return 0.0
    hull = convex_hull(points)
    inner = hull[(hull[:, 0] > c_min) & (hull[:, 0] < c_max), 0]
    costs = np.concatenate([[c_min], inner, [c_max]])
    return float(np.trapezoid(np.interp(costs, hull[:, 0], hull[:, 1]), costs) / span)


def convex_hull(points: Array) -> Array:
    """The non-decreasing upper hull of points (M, 2) of (cost, accuracy), by ascending cost."""
    frontier = Points(points[None, :, 0], points[None, :, 1]).frontier().of(0)
    hull = frontier[np.concatenate([[True], np.diff(frontier[:, 0]) > 0.0])]
    while len(hull) > 2:
        slopes = np.diff(hull[:, 1]) / np.diff(hull[:, 0])
        below = slopes[1:] > slopes[:-1]
        if not below.any():
            break
        # Of neighbours below their chords only the first goes: the next may be on the hull once it is gone.
        goes = below & ~np.concatenate([[False], below[:-1]])
        hull = hull[np.concatenate([[True], ~goes, [True]])]
    return np.asarray(hull)


def arena_score(accuracy: ArrayLike, cost: ArrayLike, beta: float = ARENA_BETA) -> Array:
    """RouterArena's score: a harmonic mean of accuracy and of how cheap the router is, `cost` in USD a prompt.

    Cheapness is 1 at $0.0044 for 1,000 prompts and 0 at $200, on a log scale. NaN where it costs nothing. Source: Lu et
    al. (RouterArena, 2025).
    """
    accuracies, thousand = np.asarray(accuracy, np.float64), 1000.0 * np.asarray(cost, np.float64)
    low, high = np.log2(ARENA_COSTS)
    with np.errstate(divide="ignore", invalid="ignore"):
        cheapness = np.where(thousand > 0.0, (high - np.log2(thousand)) / (high - low), np.nan)
        return np.asarray((1.0 + beta) * accuracies * cheapness / (beta * accuracies + cheapness))
