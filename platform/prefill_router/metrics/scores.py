"""All metrics of a router, at one tolerance and over all tolerances, for one or many weightings of the prompts."""

# N prompts, T targets, M points, B weightings

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.common.errors import UserError
from prefill_router.metrics.choices import RiskCoverage, zone_terms
from prefill_router.metrics.curve import Points, Sweep, checked, complete, tolerance_curve, with_fewest_decimals
from prefill_router.metrics.discrimination import TargetScores, once, ratio
from prefill_router.metrics.peers import GapRecovered, arena_score, average_improvement_in_quality
from prefill_router.policy.selection import choose

Array = NDArray[np.float64]

ROUNDING = 1e-12  # tolerance when mean accuracies are compared
ENOUGH_VALIDATION = 100  # prompts: with fewer, a mean grade's standard error is up to 5 points
_MAX_ELEMENTS = 1 << 22  # of an array of weightings and points


@dataclass(frozen=True)
class RoutingScores:
    """Accuracies are fractions of prompts; costs are USD per prompt; lists have one value per target."""

    num_prompts: int  # complete ones
    best_single_accuracy: float
    best_single_cost: float
    oracle_accuracy: float
    accuracy: float
    cost: float
    efficacy: float
    cost_saving: float
    best_efficacy: float  # at the curve's most accurate point
    saving_at_best_single: float  # against the best single target's cost, at its accuracy; NaN if not reached
    p_auccc: float
    model_auccc: float
    mdp_auccc: float
    pdp_auccc: float
    apgr: float  # between the cheapest and the most accurate target
    cpt_50: float
    cpt_80: float
    aiq: float
    arena_score: float
    aurc: float
    all_right: float  # this and the next three: see `Zones`
    disagree: float
    all_wrong: float
    wrong_choices: float
    share: list[float]
    auc: list[float]
    ece: list[float]
    brier: list[float]


def score_routing(
    correct: ArrayLike,
    p: ArrayLike,
    cost: ArrayLike,
    tolerance: float = 0.0,
    paid: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> RoutingScores:
    """All metrics of a router with P(correct) `p` (N, T) and expected `cost` (T,) or (N, T), at one tolerance.

    `correct` (N, T) holds NaN for missing outcomes. `paid` is the actual cost, `cost` by default. `weights` (N,), such
    as those of `completeness_weights`, apply to routing metrics; by default all prompts weigh 1. Ratios with a zero
    denominator are NaN. Raises UserError if no prompt has an outcome for every target.
    """
    return Scorer(correct, p, cost, tolerance, paid, weights).scores()


class Scorer:
    """Computes a router's metrics on many bootstrap draws of the same prompts.

    The arguments are those of `score_routing`. A draw is the number of times each prompt was drawn. The most accurate,
    cheapest and most expensive targets and the most accurate tolerance are chosen once, on all prompts: choosing them
    per draw would favour whatever is best by chance in that draw.
    """

    def __init__(
        self,
        correct: ArrayLike,
        p: ArrayLike,
        cost: ArrayLike,
        tolerance: float = 0.0,
        paid: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> None:
        all_correct, all_p, *_ = checked(correct, p, cost, paid)
        self._complete = ~np.isnan(all_correct).any(1)
        if not self._complete.any():
            raise UserError("no prompt has an outcome for every target: grade the missing answers to score routing")
        self._weights = np.ones(len(all_p)) if weights is None else np.asarray(weights, np.float64)
        self._once = once(all_p)
        correct_NT, p_NT, cost_NT, paid_NT = complete(correct, p, cost, paid)
        self._singles = np.stack([paid_NT.T, correct_NT.T])
        self._oracle = correct_NT.max(1)
        self._sweep = Sweep(correct_NT, p_NT, cost_NT, paid_NT)
        choice = choose(p_NT, cost_NT, tolerance)[:, None]
        self._chosen = np.stack([np.take_along_axis(values, choice, 1)[:, 0] for values in (paid_NT, correct_NT)])
        self._share = (choice == np.arange(p_NT.shape[1])).astype(np.float64)
        self._zones = zone_terms(correct_NT, self._chosen[1])
        self._risk = RiskCoverage(self._chosen[1], np.take_along_axis(p_NT, choice, 1)[:, 0])
        (costs,), (accuracies,) = self.singles(self._once)
        self._cheapest, self._best = weak, strong = _first(costs, -accuracies), _first(-accuracies, costs)
        self.dearest = int(costs.argmax())
        curve = self.curve()
        self._highest = _first(-curve[:, 2], curve[:, 1])
        self._gap = GapRecovered(correct_NT[:, strong], correct_NT[:, weak], p_NT[:, strong] - p_NT[:, weak])
        known = ~np.isnan(all_correct)
        self._targets = [
            (rows, TargetScores(y[rows], p_t[rows]))
            for y, p_t, rows in zip(all_correct.T, all_p.T, known.T, strict=True)
        ]

    def scores(self) -> RoutingScores:
        figures = {name: values[0].tolist() for name, values in self.figures(self._once).items()}
        return RoutingScores(num_prompts=int(self._complete.sum()), **figures)

    def figures(self, draws_BN: NDArray[Any]) -> dict[str, Array]:
        """Every field of RoutingScores except `num_prompts`, for each draw: (B,) or (B, T)."""
        parts = [self._figures(chunk) for chunk in self._chunks(draws_BN)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def tolerance_reaching(self, accuracy: float) -> float | None:
        """The cheapest tolerance with at least this accuracy on all prompts; None if there is none."""
        tolerances, costs, accuracies = self.curve().T
        accurate = np.flatnonzero(accuracies >= accuracy - ROUNDING)
        return with_fewest_decimals(tolerances, accurate[np.argmin(costs[accurate])]) if accurate.size else None

    def points_at(self, tolerances_M: ArrayLike, draws_BN: NDArray[Any]) -> tuple[Array, Array]:
        """Mean cost and accuracy (B, M) at the given tolerances."""
        parts = [self._sweep.points_at(tolerances_M, self._weighed(chunk)) for chunk in self._chunks(draws_BN)]
        return np.concatenate([part.costs for part in parts]), np.concatenate([part.accuracies for part in parts])

    def curve(self) -> Array:
        """Rows (tolerance, mean cost, accuracy) at each tolerance where a choice changes, in ascending order."""
        points = self._sweep.points(self._weighed(self._once))
        return np.column_stack([self._sweep.tolerances, points.of(0)])

    def singles(self, draws_BN: NDArray[Any]) -> tuple[Array, Array]:
        """Mean cost and accuracy (B, T) of each target."""
        w = self._weighed(draws_BN)
        costs, accuracies = (_mean(w, values.T) for values in self._singles)
        return costs, accuracies

    def _chunks(self, draws_BN: NDArray[Any]) -> Iterator[Array]:
        rows = max(1, _MAX_ELEMENTS // self._share.size)
        return (draws_BN[i : i + rows].astype(np.float64) for i in range(0, len(draws_BN), rows))

    def _weighed(self, draws_BN: NDArray[Any]) -> Array:
        """The weights of the complete prompts in each draw."""
        return np.asarray((draws_BN * self._weights)[:, self._complete])

    def _figures(self, draws_BN: Array) -> dict[str, Array]:
        w = self._weighed(draws_BN)
        points, singles = self._sweep.points(w), Points(*self.singles(draws_BN))
        best_cost, best_accuracy = singles.costs[:, self._best], singles.accuracies[:, self._best]
        oracle = _mean(w, self._oracle)
        headroom = np.where(oracle - best_accuracy > ROUNDING, oracle - best_accuracy, 0.0)
        cost, accuracy = (_mean(w, values) for values in self._chosen)
        reached = np.where(points.accuracies >= best_accuracy[:, None] - ROUNDING, points.costs, np.inf).min(1)
        all_right, disagree, all_wrong, shortfall = _mean(w, self._zones.T).T
        return {
            "best_single_accuracy": best_accuracy,
            "best_single_cost": best_cost,
            "oracle_accuracy": oracle,
            "accuracy": accuracy,
            "cost": cost,
            "efficacy": ratio(accuracy - best_accuracy, headroom),
            "cost_saving": 1.0 - ratio(cost, singles.costs[:, self.dearest]),
            "best_efficacy": ratio(points.accuracies[:, self._highest] - best_accuracy, headroom),
            "saving_at_best_single": np.where(np.isfinite(reached), 1.0 - ratio(reached, best_cost), np.nan),
            **self._areas(points, singles),
            "apgr": self._gap.average(w),
            "cpt_50": self._gap.threshold(w, 0.5),
            "cpt_80": self._gap.threshold(w, 0.8),
            "arena_score": arena_score(accuracy, cost),
            "aurc": self._risk.area(w),
            "all_right": all_right,
            "disagree": disagree,
            "all_wrong": all_wrong,
            "wrong_choices": ratio(shortfall, disagree),
            "share": _mean(w, self._share),
            "auc": self._by_target(draws_BN, TargetScores.auc),
            "ece": self._by_target(draws_BN, TargetScores.ece),
            "brier": self._by_target(draws_BN, TargetScores.brier),
        }

    def _areas(self, points: Points, singles: Points) -> dict[str, Array]:
        """The metrics that are areas below the router's curve and the frontiers."""
        c_min, floor = singles.costs[:, self._cheapest], singles.accuracies[:, self._cheapest]
        c_max = singles.costs[:, self.dearest]
        curve = points.by_cost()
        p_area, model_area, joint_area = (
            part.area(c_min, c_max, floor) for part in (curve, singles.frontier(), singles.joined(curve).frontier())
        )
        return {
            "p_auccc": p_area,
            "model_auccc": model_area,
            "mdp_auccc": p_area - model_area,
            "pdp_auccc": joint_area - p_area,
            "aiq": _aiq(curve, np.stack([c_min, floor], axis=1), c_max),
        }

    def _by_target(self, draws_BN: Array, score: Callable[[TargetScores, Array], Array]) -> Array:
        return np.stack([score(target, draws_BN[:, rows]) for rows, target in self._targets], axis=1)


def best_tolerance(correct: ArrayLike, p: ArrayLike, cost: ArrayLike, paid: ArrayLike | None = None) -> float:
    """The tolerance to route at, by the one-standard-error rule (Breiman et al., 1984).

    This is the cheapest tolerance whose accuracy is within one standard error of the curve's best, and at least that
    of the best single target if the curve reaches it, with the fewest decimals that choose the same targets. 0 if no
    prompt has an outcome for every target.
    """
    curve = tolerance_curve(correct, p, cost, paid)
    if not len(curve):
        return 0.0
    correct_NT, p_NT, cost_NT, _ = complete(correct, p, cost, paid)
    highest, best_single = curve[:, 2].max(), correct_NT.mean(0).max()
    choice = choose(p_NT, cost_NT, curve[curve[:, 2].argmax(), 0])[:, None]
    enough = highest - np.take_along_axis(correct_NT, choice, 1).std() / np.sqrt(len(correct_NT))
    if highest >= best_single - ROUNDING:
        enough = max(enough, best_single)
    accurate = np.flatnonzero(curve[:, 2] >= enough - ROUNDING)
    cheapest = accurate[_first(curve[accurate, 1], -curve[accurate, 2])]
    return with_fewest_decimals(curve[:, 0], cheapest)


def _mean(weights_BN: Array, values: Array) -> Array:
    """The weighted means (B,) or (B, T) of values (N,) or (N, T)."""
    # Dividing last makes equal counts of right answers equal accuracies, whatever the order of summation.
    return ratio((weights_BN @ values).T, weights_BN.sum(1)).T


def _aiq(curve: Points, cheapest_B2: Array, c_max_B: Array) -> Array:
    """AIQ (B,) of each weighting's curve with the cheapest target added, which a tolerance of 1 always reaches."""
    found = []
    for i, (cheapest, c_max) in enumerate(zip(cheapest_B2, c_max_B, strict=True)):
        points = np.concatenate([cheapest[None], curve.of(i)])
        found.append(average_improvement_in_quality(points, cheapest[0], c_max))
    return np.asarray(found)


def _first(keys: Array, ties: Array) -> int:
    """The index of the lowest key; ties go to the lowest of `ties`."""
    return int(np.lexsort((ties, keys))[0])
