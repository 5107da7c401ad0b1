"""How good a router is: accuracy, efficacy, saving, the cost-coverage curve and its area, AUC and calibration.

Every definition is METHOD's, "Metrics". Routing metrics count the prompts on which every target has an outcome;
metrics of one target count the prompts on which that target has one.
"""

# N prompts, T targets, M points

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.errors import UserError
from prefill_router.policy import choose

Array = NDArray[np.float64]

CALIBRATION_BINS = 15
_ROUNDING = 1e-12  # of a mean of accuracies


@dataclass(frozen=True)
class RoutingScores:
    """Accuracies are fractions of prompts, costs USD a prompt; `auc`, `ece`, `brier` have a value a target."""

    num_prompts: int  # on which every target has an outcome
    best_single_accuracy: float
    best_single_cost: float
    oracle_accuracy: float
    accuracy: float
    cost: float
    efficacy: float
    cost_saving: float
    best_efficacy: float  # at the curve's most accurate point
    saving_at_best_single: float  # against the best single target's cost, at its accuracy or more; NaN if unreached
    p_auccc: float
    model_auccc: float
    mdp_auccc: float
    pdp_auccc: float
    auc: list[float]
    ece: list[float]
    brier: list[float]


def pareto_frontier(points: ArrayLike) -> Array:
    """Of points (M, 2) of (cost, accuracy): by ascending cost, those that beat every accuracy before them."""
    array = np.asarray(points, np.float64).reshape(-1, 2)
    ordered = array[np.lexsort((-array[:, 1], array[:, 0]))]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], ordered[:-1, 1]])) if len(ordered) else np.empty(0)
    return ordered[ordered[:, 1] > before]


def cost_coverage_curve(correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None = None) -> Array:
    """The points (M, 2) of (mean cost, accuracy) for every tolerance among the observed gaps max p - p_t.

    Sorted by cost, then accuracy. `correct` (N, T) may hold NaN: such prompts are left out. `cost` is (T,) or (N, T):
    what the choice expects. `paid`, of the same shape, is what the answers really cost; by default, as expected.
    """
    curve = tolerance_curve(*_complete(correct, p, cost, paid))[:, 1:]
    # Equal costs that were summed in another order differ in their last digits: they must still tie.
    cost_key = np.round(curve[:, 0] / max(np.abs(curve[:, 0]).max(initial=0.0), 1e-300), 12)
    return curve[np.lexsort((curve[:, 1], cost_key))]


def tolerance_curve(correct_NT: Array, p_NT: Array, cost_NT: Array, paid_NT: Array) -> Array:
    """Rows (tolerance, mean cost paid, accuracy), by ascending tolerance, of prompts with all outcomes.

    One sweep: as the tolerance grows, a prompt's targets become eligible in the order of their gaps, and its choice
    moves only when a cheaper one arrives. Sorting those moves costs O(N T log N T), not a choice for each tolerance.
    """
    n = len(p_NT)
    if not n:
        return np.empty((0, 3))
    rows = np.arange(n)[:, None]
    # Highest p first; at equal p the cheaper one first, then the pool's order: lexsort is stable.
    arrival = np.lexsort((cost_NT, -p_NT), axis=1)
    p_sorted, cost_sorted = p_NT[rows, arrival], cost_NT[rows, arrival]
    gaps = p_sorted[:, :1] - p_sorted
    # Chosen after each arrival: the first that attains the lowest cost so far, hence the higher p at a tie.
    lowest = np.minimum.accumulate(cost_sorted, axis=1)
    is_new = np.concatenate([np.ones((n, 1), bool), cost_sorted[:, 1:] < lowest[:, :-1]], axis=1)
    chosen = np.maximum.accumulate(np.where(is_new, np.arange(p_NT.shape[1]), 0), axis=1)
    choice = arrival[rows, chosen]
    order = np.argsort(gaps, axis=None, kind="stable")
    tolerances, first = np.unique(gaps.ravel()[order], return_index=True)
    last = np.append(first[1:], order.size) - 1

    def mean_of_chosen(values_NT: Array) -> Array:
        moves = np.diff(values_NT[rows, choice], axis=1, prepend=0.0)
        return np.asarray(np.cumsum(moves.ravel()[order])[last] / n)

    return np.column_stack([tolerances, mean_of_chosen(paid_NT), mean_of_chosen(correct_NT)])


def auccc(curve: ArrayLike, c_min: float, c_max: float, floor: float) -> float:
    """Area under a cost-coverage curve (M, 2), above `floor`, over the costs [c_min, c_max], divided by their range.

    Costs within 1e-9 of the range from an end lie on it. 0 for an empty curve or range.
    """
    points = np.asarray(curve, np.float64).reshape(-1, 2)
    span = c_max - c_min
    if not span > 0.0:
        return 0.0
    slack = 1e-9 * span
    points = points[(points[:, 0] >= c_min - slack) & (points[:, 0] <= c_max + slack)]
    if not len(points):
        return 0.0
    costs, accuracies = points[:, 0].copy(), points[:, 1]
    costs[costs <= c_min + slack] = c_min
    costs[costs >= c_max - slack] = c_max
    if costs[0] > c_min:
        costs, accuracies = np.insert(costs, 0, c_min), np.insert(accuracies, 0, floor)
    if costs[-1] < c_max:
        costs, accuracies = np.append(costs, c_max), np.append(accuracies, accuracies[-1])
    return float(np.trapezoid(accuracies - floor, costs) / span)


def score_routing(
    correct: ArrayLike, p: ArrayLike, cost: ArrayLike, tolerance: float = 0.0, paid: ArrayLike | None = None
) -> RoutingScores:
    """All metrics of a router with P(correct) `p` (N, T) and expected `cost` (T,) or (N, T), at one tolerance.

    `correct` (N, T) may hold NaN for missing outcomes. Costs are counted as `paid`; by default, as expected. Ratios
    without a denominator are NaN. Raises UserError where no prompt has an outcome of every target.
    """
    correct_NT, p_NT, cost_NT, paid_NT = _complete(correct, p, cost, paid)
    n = len(p_NT)
    if not n:
        raise UserError("no prompt has an outcome of every target: routing cannot be scored")
    singles = np.column_stack([paid_NT.mean(0), correct_NT.mean(0)])
    cheapest, dearest = singles[_cheapest(singles)], singles[np.argmax(singles[:, 0])]
    best = pareto_frontier(singles)[-1]  # the most accurate; the cheaper one at a tie
    oracle = float(correct_NT.max(1).mean())
    choice = choose(p_NT, cost_NT, tolerance)[:, None]
    accuracy = float(np.take_along_axis(correct_NT, choice, 1).mean())
    mean_cost = float(np.take_along_axis(paid_NT, choice, 1).mean())
    curve = cost_coverage_curve(correct_NT, p_NT, cost_NT, paid_NT)
    reached = curve[curve[:, 1] >= best[1] - _ROUNDING, 0]

    def area(points: Array) -> float:
        return auccc(points, cheapest[0], dearest[0], cheapest[1])

    p_area, model_area = area(curve), area(pareto_frontier(singles))
    headroom = oracle - best[1] if oracle - best[1] > _ROUNDING else 0.0
    return RoutingScores(
        num_prompts=n,
        best_single_accuracy=float(best[1]),
        best_single_cost=float(best[0]),
        oracle_accuracy=oracle,
        accuracy=accuracy,
        cost=mean_cost,
        efficacy=_ratio(accuracy - best[1], headroom),
        cost_saving=1.0 - _ratio(mean_cost, dearest[0]),
        best_efficacy=_ratio(curve[:, 1].max() - best[1], headroom),
        saving_at_best_single=1.0 - _ratio(reached.min(), best[0]) if len(reached) else float("nan"),
        p_auccc=p_area,
        model_auccc=model_area,
        mdp_auccc=p_area - model_area,
        pdp_auccc=area(pareto_frontier(np.concatenate([singles, curve]))) - p_area,
        **_per_target(np.asarray(correct, np.float64), np.asarray(p, np.float64)),
    )


def best_tolerance(correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None = None) -> float:
    """The tolerance to route at, by the one-standard-error rule (Breiman et al., 1984).

    The cheapest one whose accuracy is within a standard error of the best on the curve, and not below that of the best
    single target where the curve reaches it. 0 where no prompt has an outcome of every target.
    """
    correct_NT, p_NT, cost_NT, paid_NT = _complete(correct, p, cost, paid)
    curve = tolerance_curve(correct_NT, p_NT, cost_NT, paid_NT)
    if not len(curve):
        return 0.0
    highest, best_single = curve[:, 2].max(), correct_NT.mean(0).max()
    enough = highest - np.sqrt(highest * (1.0 - highest) / len(p_NT))
    if highest >= best_single - _ROUNDING:
        enough = max(enough, best_single)
    reached = curve[curve[:, 2] >= enough - _ROUNDING]
    return float(reached[np.lexsort((-reached[:, 2], reached[:, 1]))[0], 0])


def roc_auc(correct: ArrayLike, p: ArrayLike) -> float:
    """P(a right answer's p exceeds a wrong one's), a tie counting half; NaN where one class is empty.

    An outcome between 0 and 1 counts in both classes, in that proportion.
    """
    y, scores = np.asarray(correct, np.float64), np.asarray(p, np.float64)
    _, group = np.unique(scores, return_inverse=True)
    right, wrong = np.bincount(group, weights=y), np.bincount(group, weights=1.0 - y)
    below = np.cumsum(wrong) - wrong
    return _ratio(float(right @ (below + wrong / 2)), float(right.sum() * wrong.sum()))


def reliability_curve(correct: ArrayLike, p: ArrayLike, bins: int = CALIBRATION_BINS) -> Array:
    """Rows (M, 3) of (mean p, accuracy, number of prompts), a row a bin that holds any, of `bins` of equal width.

    The reliability diagram of Guo et al. (2017), for outcomes and predictions (N,).
    """
    y, scores = np.asarray(correct, np.float64), np.asarray(p, np.float64)
    index = np.clip(np.ceil(scores * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    sums = np.column_stack([np.bincount(index, weights=values, minlength=bins) for values in (scores, y)])
    filled = counts > 0
    return np.column_stack([sums[filled] / counts[filled, None], counts[filled]])


def expected_calibration_error(correct: ArrayLike, p: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Mean over prompts of |accuracy - mean p| of the prompt's bin, of `bins` of equal width (Guo et al., 2017)."""
    mean_p, accuracy, counts = reliability_curve(correct, p, bins).T
    return _ratio(float(np.abs(accuracy - mean_p) @ counts), float(counts.sum()))


def _complete(
    correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """The prompts on which every target has an outcome: correct, p, cost and paid, each (N, T)."""
    correct_NT, p_NT = np.asarray(correct, np.float64), np.asarray(p, np.float64)
    if correct_NT.ndim != 2 or correct_NT.shape != p_NT.shape:
        raise ValueError(f"correct {correct_NT.shape} and p {p_NT.shape} must both be (prompts, targets)")
    if np.isnan(p_NT).any():
        raise ValueError("p must not be NaN")
    cost_NT = np.broadcast_to(np.asarray(cost, np.float64), p_NT.shape)
    paid_NT = cost_NT if paid is None else np.broadcast_to(np.asarray(paid, np.float64), p_NT.shape)
    complete = ~np.isnan(correct_NT).any(1)
    return correct_NT[complete], p_NT[complete], cost_NT[complete], paid_NT[complete]


def _cheapest(singles: Array) -> int:
    return int(np.lexsort((-singles[:, 1], singles[:, 0]))[0])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0.0 else float("nan")


def _per_target(correct_NT: Array, p_NT: Array) -> dict[str, Any]:
    scores: dict[str, list[float]] = {"auc": [], "ece": [], "brier": []}
    for y, scores_N in zip(correct_NT.T, p_NT.T, strict=True):
        graded = ~np.isnan(y)
        y, scores_N = y[graded], scores_N[graded]
        scores["auc"].append(roc_auc(y, scores_N))
        scores["ece"].append(expected_calibration_error(y, scores_N))
        scores["brier"].append(float(np.mean((scores_N - y) ** 2)) if len(y) else float("nan"))
    return scores
