"""Cost-coverage curves: the (cost, accuracy) points over all tolerances, their Pareto frontier and the area below.

Curves are computed for many weightings of the same prompts at once, for the bootstrap: prompts are sorted once, and
each weighting costs one cumulative sum.
"""

# N prompts, T targets, M points, B weightings

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.metrics.discrimination import once, ratio

Array = NDArray[np.float64]


def pareto_frontier(points: ArrayLike) -> Array:
    """The points (M, 2) of (cost, accuracy) that are more accurate than every cheaper point, by ascending cost."""
    array = np.asarray(points, np.float64).reshape(-1, 2)
    ordered = array[np.lexsort((-array[:, 1], array[:, 0]))]
    return np.asarray(ordered[_beats_all_before(ordered[None, :, 1])[0]])


def convex_hull(points: Array) -> Array:
    """The vertices of the non-decreasing upper hull of points (M, 2) of (cost, accuracy), by ascending cost."""
    hull = pareto_frontier(points)
    while len(hull) > 2:
        slopes = np.diff(hull[:, 1]) / np.diff(hull[:, 0])
        below = slopes[1:] > slopes[:-1]
        if not below.any():
            break
        # Of adjacent points below their chords, drop only the first: the next may be on the hull without it.
        dropped = below & ~np.concatenate([[False], below[:-1]])
        hull = hull[np.concatenate([[True], ~dropped, [True]])]
    return hull


def cost_coverage_curve(correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None = None) -> Array:
    """The points (M, 2) of (mean cost, accuracy) for every tolerance among the observed gaps max p - p_t.

    Points are sorted by cost, then accuracy. Prompts with a NaN in `correct` (N, T) are left out. `cost`, (T,) or
    (N, T), is the expected cost that the choice uses; `paid`, of the same shape, the actual cost, `cost` by default.
    """
    return Points(*tolerance_curve(correct, p, cost, paid).T[1:, None]).by_cost().of(0)


def tolerance_curve(correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None = None) -> Array:
    """The points of `cost_coverage_curve` as rows (tolerance, mean cost paid, accuracy), by ascending tolerance."""
    correct_NT, p_NT, cost_NT, paid_NT = complete(correct, p, cost, paid)
    if not len(p_NT):
        return np.empty((0, 3))
    sweep = Sweep(correct_NT, p_NT, cost_NT, paid_NT)
    tolerances = np.unique(p_NT.max(1, keepdims=True) - p_NT)
    return np.column_stack([tolerances, sweep.points_at(tolerances, once(p_NT)).of(0)])


def spread_by_cost(costs: ArrayLike, num_points: int) -> NDArray[np.int64]:
    """The indices, ascending, of at most `num_points` of the costs (M,): those nearest to equal steps between the ends.

    Of equal costs the first is taken.
    """
    array = np.asarray(costs, np.float64)
    steps = np.linspace(array.max(), array.min(), num_points)
    return np.unique(np.abs(array - steps[:, None]).argmin(1))


def with_fewest_decimals(tolerances: ArrayLike, index: int) -> float:
    """The tolerance with the fewest decimals, at least three, that chooses as the one at `index` does.

    `tolerances` (M,), ascending, are those where a choice changes: what is below the next one chooses the same.
    """
    array = np.asarray(tolerances, np.float64)
    low, high = float(array[index]), float(array[index + 1]) if index + 1 < len(array) else np.inf
    for decimals in range(3, 18):
        rounded = float(Decimal(repr(low)).quantize(Decimal(10) ** -decimals, ROUND_CEILING))
        if rounded < high:
            return rounded
    return low


def auccc(curve: ArrayLike, c_min: float, c_max: float, floor: float) -> float:
    """Area between a cost-coverage curve (M, 2) and `floor` on [c_min, c_max], divided by c_max - c_min.

    Costs within 1e-9 (c_max - c_min) of an end are moved to it. An empty curve or range has area 0.
    """
    costs, accuracies = np.asarray(curve, np.float64).reshape(-1, 2).T
    return float(Points(costs[None], accuracies[None]).area(*(np.array([end]) for end in (c_min, c_max, floor)))[0])


class Sweep:
    """The choices on complete prompts as the tolerance grows.

    A prompt's targets become eligible in the order of their gaps, and its choice changes only when a cheaper target
    becomes eligible. Sorting these changes takes O(N T log N T), without a new choice at every tolerance.
    """

    def __init__(self, correct_NT: Array, p_NT: Array, cost_NT: Array, paid_NT: Array) -> None:
        rows = np.arange(len(p_NT))[:, None]
        # Highest p first, then the cheaper target, then the pool's order: lexsort is stable.
        arrival = np.lexsort((cost_NT, -p_NT), axis=1)
        p_sorted, cost_sorted = p_NT[rows, arrival], cost_NT[rows, arrival]
        lowest = np.minimum.accumulate(cost_sorted, axis=1)
        moves = np.concatenate([np.ones((len(p_NT), 1), bool), cost_sorted[:, 1:] < lowest[:, :-1]], axis=1)
        # After each arrival, the first target with the lowest cost so far is chosen: at equal cost, the higher p.
        chosen = np.maximum.accumulate(np.where(moves, np.arange(p_NT.shape[1]), 0), axis=1)
        choice = arrival[rows, chosen]

        def steps(values_NT: Array) -> Array:
            return np.asarray(np.diff(values_NT[rows, choice], axis=1, prepend=0.0)[moves])

        gaps = (p_sorted[:, :1] - p_sorted)[moves]
        order = np.argsort(gaps, kind="stable")
        self.tolerances, first = np.unique(gaps[order], return_index=True)
        self._last = np.append(first[1:], order.size) - 1
        self._prompts = np.nonzero(moves)[0][order]
        self._paid, self._correct = steps(paid_NT)[order], steps(correct_NT)[order]

    def points(self, weights_BN: Array) -> Points:
        """Mean cost and accuracy at each of `tolerances`, for each weighting."""
        moved, total = weights_BN[:, self._prompts], weights_BN.sum(1, keepdims=True)
        sums = (np.cumsum(moved * steps, axis=1)[:, self._last] for steps in (self._paid, self._correct))
        return Points(*(ratio(values, total) for values in sums))

    def points_at(self, tolerances_M: ArrayLike, weights_BN: Array) -> Points:
        """Mean cost and accuracy at the given tolerances, for each weighting."""
        points = self.points(weights_BN)
        at = np.searchsorted(self.tolerances, np.asarray(tolerances_M), side="right") - 1
        return Points(points.costs[:, at], points.accuracies[:, at])


class Points:
    """Costs and accuracies, each (B, M), of M points (a curve, or single targets) under B weightings."""

    def __init__(self, costs_BM: Array, accuracies_BM: Array) -> None:
        self.costs, self.accuracies = costs_BM, accuracies_BM

    def of(self, weighting: int) -> Array:
        """The points (M, 2) of (cost, accuracy) under one weighting."""
        return np.column_stack([self.costs[weighting], self.accuracies[weighting]])

    def by_cost(self) -> Points:
        """Sorted by cost, then accuracy."""
        # Equal costs summed in different orders differ in their last digits, and must still tie.
        largest = np.abs(self.costs).max(axis=1, keepdims=True, initial=0.0)
        keys = np.round(self.costs / np.maximum(largest, 1e-300), 12)
        return self._taken(np.lexsort((self.accuracies, keys), axis=1))

    def frontier(self) -> Points:
        """The Pareto frontier. A point off it is replaced by the frontier point before it, which adds no area."""
        ordered = self._taken(np.lexsort((-self.accuracies, self.costs), axis=1))
        on_it = np.where(_beats_all_before(ordered.accuracies), np.arange(ordered.costs.shape[1]), 0)
        return ordered._taken(np.maximum.accumulate(on_it, axis=1))

    def joined(self, others: Points) -> Points:
        return Points(
            np.concatenate([self.costs, others.costs], axis=1),
            np.concatenate([self.accuracies, others.accuracies], axis=1),
        )

    def area(self, c_min_B: Array, c_max_B: Array, floor_B: Array) -> Array:
        """`auccc` (B,) of the points of each weighting, which must be sorted by cost."""
        span = (c_max_B - c_min_B)[:, None]
        low, high, floor = c_min_B[:, None], c_max_B[:, None], floor_B[:, None]
        slack = 1e-9 * span
        is_left, is_right = self.costs < low - slack, self.costs > high + slack
        inside = ~is_left & ~is_right
        costs = np.where(self.costs <= low + slack, low, np.where(self.costs >= high - slack, high, self.costs))
        # Points left of the range move to (c_min, floor), points right of it to (c_max, last accuracy inside): these
        # are the end points that platform/METHOD.md, "Metrics", prepends and appends.
        above = np.where(is_left, 0.0, self.accuracies - floor)
        last = np.maximum.accumulate(np.where(inside, np.arange(inside.shape[1]), 0), axis=1)
        above = np.where(is_right, np.take_along_axis(above, last, 1), above)
        costs = np.concatenate([low, costs, high], axis=1)
        above = np.concatenate([np.zeros_like(floor), above, above[:, -1:]], axis=1)
        areas = np.trapezoid(above, costs, axis=1)
        usable = inside.any(1) & (span[:, 0] > 0.0)
        return np.where(usable, areas / np.where(usable, span[:, 0], 1.0), 0.0)

    def _taken(self, order_BM: NDArray[np.int64]) -> Points:
        return Points(*(np.take_along_axis(values, order_BM, 1) for values in (self.costs, self.accuracies)))


def complete(
    correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """correct, p, cost and paid of the complete prompts, each (N, T). Raises ValueError as `checked` does."""
    arrays = checked(correct, p, cost, paid)
    is_complete = ~np.isnan(arrays[0]).any(1)
    correct_NT, p_NT, cost_NT, paid_NT = (values[is_complete] for values in arrays)
    return correct_NT, p_NT, cost_NT, paid_NT


def checked(
    correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """correct, p, cost and paid of all prompts, each (N, T). Raises ValueError for unequal shapes or a NaN in `p`."""
    correct_NT, p_NT = np.asarray(correct, np.float64), np.asarray(p, np.float64)
    if correct_NT.ndim != 2 or correct_NT.shape != p_NT.shape:
        raise ValueError(f"correct {correct_NT.shape} and p {p_NT.shape} must both be (prompts, targets)")
    if np.isnan(p_NT).any():
        raise ValueError("p must not be NaN")
    cost_NT = np.broadcast_to(np.asarray(cost, np.float64), p_NT.shape)
    paid_NT = cost_NT if paid is None else np.broadcast_to(np.asarray(paid, np.float64), p_NT.shape)
    return correct_NT, p_NT, cost_NT, paid_NT


def _beats_all_before(accuracies_BM: Array) -> NDArray[np.bool_]:
    before = np.full_like(accuracies_BM, -np.inf)
    before[:, 1:] = np.maximum.accumulate(accuracies_BM, axis=1)[:, :-1]
    return np.asarray(accuracies_BM > before)
