"""Metrics that other projects rank routers by: RouteLLM's APGR and CPT, RouterBench's AIQ, RouterArena's score."""

# N prompts, M points, B weightings

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.metrics.curve import convex_hull
from prefill_router.metrics.discrimination import once, ratio

Array = NDArray[np.float64]

ARENA_BETA = 0.1
ARENA_COSTS = (0.0044, 200.0)  # USD for 1,000 prompts


def average_performance_gap_recovered(strong: ArrayLike, weak: ArrayLike, score: ArrayLike) -> float:
    """APGR: the recovered share of the accuracy gap between two targets, averaged over all shares of strong calls.

    `strong` and `weak` (N,) are the outcomes of the two targets. `score` (N,) ranks the prompts: those with the highest
    score go to the strong target first; prompts of equal score move together. Ong et al. (RouteLLM, 2024) average over
    ten shares; this integral is exact. NaN if the strong target is not more accurate.
    """
    return float(GapRecovered(strong, weak, score).average(once(score))[0])


def call_performance_threshold(strong: ArrayLike, weak: ArrayLike, score: ArrayLike, recovered: float) -> float:
    """CPT: the smallest share of calls to the strong target that recovers the share `recovered` of the gap.

    The other arguments are those of `average_performance_gap_recovered`. Source: Ong et al. (RouteLLM, 2024). NaN if
    the strong target is not more accurate.
    """
    return float(GapRecovered(strong, weak, score).threshold(once(score), recovered)[0])


class GapRecovered:
    """Curves of the recovered gap by the share of strong calls, for many weightings of the same prompts."""

    def __init__(self, strong: ArrayLike, weak: ArrayLike, score: ArrayLike) -> None:
        scores = np.asarray(score, np.float64)
        self._order = np.argsort(-scores, kind="stable")
        self._gain = (np.asarray(strong, np.float64) - np.asarray(weak, np.float64))[self._order]
        self._last = np.cumsum(np.unique(-scores, return_counts=True)[1]) - 1  # last prompt of each distinct score

    def average(self, weights_BN: Array) -> Array:
        return np.asarray([np.trapezoid(gap, calls) for calls, gap in self._curves(weights_BN)])

    def threshold(self, weights_BN: Array, recovered: float) -> Array:
        found = []
        for calls, gap in self._curves(weights_BN):
            reached = np.flatnonzero(gap >= recovered - 1e-12)
            found.append(calls[reached[0]] if len(reached) else np.nan)
        return np.asarray(found)

    def _curves(self, weights_BN: Array) -> Iterator[tuple[Array, Array]]:
        """Yields shares of strong calls and of the recovered gap, both starting at 0, for each weighting."""
        weights = weights_BN[:, self._order]
        calls, gain = (np.cumsum(values, axis=1)[:, self._last] for values in (weights, weights * self._gain))
        for calls_M, gain_M in zip(calls, gain, strict=True):
            shares = (ratio(values, values[-1]) for values in (calls_M, gain_M))
            yield tuple(np.concatenate([[0.0], share]) for share in shares)  # type: ignore[misc]


def average_improvement_in_quality(curve: ArrayLike, c_min: float, c_max: float) -> float:
    """AIQ: the mean accuracy of the curve's non-decreasing convex hull over the costs [c_min, c_max].

    `curve` (M, 2) holds (cost, accuracy). The hull starts at the cheapest point and keeps its last accuracy beyond the
    most expensive one; a random mixture of two points reaches any point between them. 0 for an empty range, NaN for an
    empty curve. Source: Hu et al. (RouterBench, 2024).
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


def arena_score(accuracy: ArrayLike, cost: ArrayLike, beta: float = ARENA_BETA) -> Array:
    """RouterArena's score: a weighted harmonic mean of accuracy and cheapness; `cost` is in USD per prompt.

    Cheapness falls on a log scale from 1 at $0.0044 per 1,000 prompts to 0 at $200. NaN at zero cost. Source: Lu et al.
    (RouterArena, 2025).
    """
    accuracies, thousand = np.asarray(accuracy, np.float64), 1000.0 * np.asarray(cost, np.float64)
    low, high = np.log2(ARENA_COSTS)
    with np.errstate(divide="ignore", invalid="ignore"):
        cheapness = np.where(thousand > 0.0, (high - np.log2(thousand)) / (high - low), np.nan)
        return np.asarray((1.0 + beta) * accuracies * cheapness / (beta * accuracies + cheapness))
