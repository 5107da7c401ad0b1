"""Scores a router, every single target and every baseline on the same held-out prompts and bootstrap draws."""

# N prompts, T targets, B draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.console import doing
from prefill_router.common.errors import UserError
from prefill_router.evaluation.calibration_summary import CalibrationSummary
from prefill_router.evaluation.learning_curve import Score
from prefill_router.evaluation.results import HEADLINES, Evaluation, OperatingPoint, Standing, quality, thinned
from prefill_router.metrics import (
    Scorer,
    bootstrap_weights,
    completeness_weights,
    interval_from_draws,
    risk_coverage_curve,
    spread_by_cost,
    with_fewest_decimals,
)
from prefill_router.metrics.discrimination import has_partial_credit, ratio
from prefill_router.metrics.scores import ROUNDING
from prefill_router.policy.answer_cost import answer_costs, billed_share
from prefill_router.policy.pool import Pool
from prefill_router.policy.selection import choose

Array = NDArray[Any]

NUM_DRAWS = 500
_LEARNING_DRAWS = 100
_BAND_POINTS, _TOLERANCES = 40, 12


@dataclass(frozen=True)
class HeldOut:
    """The prompts of the held-out split and their outcomes."""

    num_tokens: Array  # (N,)
    correct: Array  # (N, T), NaN where missing
    output_tokens: Array  # (N, T), NaN where missing
    clusters: Array | None = None  # (N,) near-duplicates share a cluster; by default each prompt is its own
    cost_usd: Array | None = None  # (N, T) as billed, NaN where unknown

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True)
class Contender:
    """The predictions of a router or a baseline for the held-out prompts."""

    name: str
    title: str
    p_correct: Array  # (N, T)
    expected_output_tokens: Array  # (N, T)
    tolerance: float
    has_hindsight: bool = False  # uses the outcomes themselves


@doing("drawing bootstrap samples for the scores")
def evaluate(
    pool: Pool,
    version: str,
    held_out: HeldOut,
    router: Contender,
    baselines: Sequence[Contender] = (),
    *,
    p_uncalibrated: Array | None = None,
    median_output_tokens: Array | None = None,
    num_seen: int = 0,
    num_validation: int | None = None,
    num_draws: int = NUM_DRAWS,
    about: dict[str, str] | None = None,
) -> Evaluation:
    """Scores a router and its baselines.

    Targets are chosen by expected cost. Costs are counted as `answer_costs` does, with the router's expected length
    where the actual one is unknown. `p_uncalibrated` and `median_output_tokens` (N, T) are the router's, if they
    differ from those of its choice. Complete prompts are weighted by `completeness_weights`, with the router's mean
    P(correct) as difficulty. Raises UserError if there are no held-out prompts, or none is complete.
    """
    if not len(held_out):
        raise UserError(
            "no held-out prompt with outcomes: every prompt of this store was used in training: extract and grade new "
            "prompts"
        )
    scoring_run = _Scoring(pool, held_out, router, num_draws)
    choice = choose(router.p_correct, scoring_run.expected(router), router.tolerance)
    complete = np.flatnonzero(~np.isnan(scoring_run.correct).any(1))
    achieved, confidence = (values[complete, choice[complete]] for values in (scoring_run.correct, router.p_correct))
    target_cost, target_accuracy = scoring_run.singles()
    p_uncalibrated = router.p_correct if p_uncalibrated is None else p_uncalibrated
    lengths = held_out.output_tokens
    predicted_lengths = router.expected_output_tokens if median_output_tokens is None else median_output_tokens
    return Evaluation(
        pool=pool.name,
        targets=pool.target_names,
        router_version=version,
        tolerance=router.tolerance,
        num_held_out=len(held_out),
        num_complete=len(complete),
        num_seen=num_seen,
        num_validation=num_validation,
        accuracy_of_complete=float(achieved.mean()),
        standings=[scoring_run.router(router), *(scoring_run.baseline(contender) for contender in baselines)],
        band=scoring_run.band(),
        operating_points=scoring_run.operating_points(router.tolerance),
        tolerances=scoring_run.tolerances(),
        is_judged=has_partial_credit(held_out.correct),
        billed_share=billed_share(held_out.correct, held_out.cost_usd),
        target_accuracy=target_accuracy,
        target_cost=target_cost,
        calibration=CalibrationSummary.measure(scoring_run.correct, router.p_correct, p_uncalibrated),
        risk_coverage=thinned(risk_coverage_curve(achieved, confidence)).tolist(),
        length_error_tokens=_mean_error(lengths, predicted_lengths),
        length_error_median_rule_tokens=_mean_error(lengths, _medians(lengths)),
        num_draws=num_draws,
        about=about or {},
    )


def oracle(held_out: HeldOut, expected_output_tokens: Array) -> Contender:
    """The contender that knows the outcomes and chooses the cheapest target that is right."""
    p = np.nan_to_num(held_out.correct)
    return Contender("oracle", "oracle", p, expected_output_tokens, 0.0, has_hindsight=True)


def scoring(pool: Pool, held_out: HeldOut, router: Contender, num_draws: int = _LEARNING_DRAWS) -> Score:
    """A function that scores any P(correct) (N, T) on these prompts, with the router's expected lengths and tolerance.

    Raises UserError if no prompt has an outcome for every target.
    """
    scoring_run = _Scoring(pool, held_out, router, num_draws)

    def score(p_correct: Array) -> dict[str, Array]:
        headlines = scoring_run.headlines(replace(router, p_correct=p_correct))
        return {name: headlines[name] for name in ("mean_auc", "mdp_auccc")}

    return score


class _Scoring:
    """Scores contenders on the same prompts, weights and draws. The first draw takes every prompt once."""

    def __init__(self, pool: Pool, held_out: HeldOut, router: Contender, num_draws: int) -> None:
        self.pool, self.held_out = pool, held_out
        self.correct = held_out.correct.astype(np.float64)
        self.paid = answer_costs(
            pool, held_out.num_tokens, held_out.output_tokens, held_out.cost_usd, router.expected_output_tokens
        )
        self._weights = completeness_weights(self.correct, router.p_correct.mean(1))
        self._draws = bootstrap_weights(len(held_out), num_draws, clusters=held_out.clusters, all_first=True)
        self._router = self._scorer(router)
        self._router_figures = self._router.figures(self._draws)
        self._dearest_cost = self._router.singles(self._draws)[0][:, self._router.dearest]  # (B,)

    def expected(self, contender: Contender) -> Array:
        return self.pool.expected_cost(self.held_out.num_tokens, contender.expected_output_tokens)

    def _scorer(self, contender: Contender) -> Scorer:
        expected = self.expected(contender)
        return Scorer(self.correct, contender.p_correct, expected, contender.tolerance, self.paid, self._weights)

    def singles(self) -> tuple[list[float], list[float]]:
        """Mean cost and accuracy of each target."""
        costs, accuracies = self._router.singles(self._draws[:1])
        return costs[0].tolist(), accuracies[0].tolist()

    def router(self, contender: Contender) -> Standing:
        return self._standing(contender, self._router, _headlines(self._router_figures), {})

    def headlines(self, contender: Contender) -> dict[str, Array]:
        return _headlines(self._scorer(contender).figures(self._draws))

    def baseline(self, contender: Contender) -> Standing:
        scorer = self._scorer(contender)
        headlines = _headlines(scorer.figures(self._draws))
        differences = {name: values - headlines[name] for name, values in _headlines(self._router_figures).items()}
        return self._standing(contender, scorer, headlines, differences)

    def _standing(
        self, contender: Contender, scorer: Scorer, headlines: dict[str, Array], differences: dict[str, Array]
    ) -> Standing:
        return Standing(
            name=contender.name,
            title=contender.title,
            tolerance=contender.tolerance,
            has_hindsight=contender.has_hindsight,
            scores=scorer.scores(),
            intervals={name: interval_from_draws(values) for name, values in headlines.items()},
            router_less_this={name: interval_from_draws(values) for name, values in differences.items()},
            curve=thinned(scorer.curve()[::-1, 1:]).tolist(),
        )

    def band(self) -> list[list[float]]:
        """Rows (cost, low accuracy, high accuracy) along the router's curve, by ascending cost."""
        tolerances = thinned(self._router.curve()[:, 0], _BAND_POINTS)
        costs, accuracies = self._router.points_at(tolerances, self._draws)
        ends = [interval_from_draws(values) for values in accuracies.T]
        return sorted([float(cost), end.low, end.high] for cost, end in zip(costs[0], ends, strict=True))

    def tolerances(self) -> list[list[float]]:
        curve = self._router.curve()
        picked = spread_by_cost(curve[:, 1], _TOLERANCES).tolist()
        return [[with_fewest_decimals(curve[:, 0], i), *curve[i, 1:].tolist()] for i in picked]

    def operating_points(self, own_tolerance: float) -> list[OperatingPoint]:
        """The router at its own tolerance, and at the cheapest tolerance that reaches each reference accuracy."""
        best = self._router_figures["best_single_accuracy"][0]
        word = quality(is_judged=has_partial_credit(self.correct))
        accuracies = {
            f"highest {word}": self._router.curve()[:, 2].max(),
            f"{word} of the best single target": best,
            "1 point below the best single target": best - 0.01,
            "3 points below the best single target": best - 0.03,
        }
        points = [self._operating_point("default tolerance of the router", own_tolerance)]
        for title, accuracy in accuracies.items():
            if (tolerance := self._router.tolerance_reaching(accuracy)) is not None:
                points.append(self._operating_point(title, tolerance))
        return points

    def _operating_point(self, title: str, tolerance: float) -> OperatingPoint:
        costs, accuracies = (values[:, 0] for values in self._router.points_at([tolerance], self._draws))
        figures = self._router_figures
        gained = accuracies - figures["best_single_accuracy"]
        headroom = figures["oracle_accuracy"] - figures["best_single_accuracy"]
        return OperatingPoint(
            title=title,
            tolerance=tolerance,
            accuracy=interval_from_draws(accuracies),
            cost=interval_from_draws(costs),
            efficacy=interval_from_draws(ratio(gained, np.where(headroom > ROUNDING, headroom, 0.0))),
            accuracy_less_best_single=interval_from_draws(gained),
            saved_usd=interval_from_draws(figures["best_single_cost"] - costs),
            saving_against_best_single=interval_from_draws(1.0 - ratio(costs, figures["best_single_cost"])),
            saving_against_dearest=interval_from_draws(1.0 - ratio(costs, self._dearest_cost)),
        )


def _headlines(figures: dict[str, Array]) -> dict[str, Array]:
    means = {f"mean_{name}": _mean_over_targets(figures[name]) for name in ("auc", "brier")}
    return {name: {**figures, **means}[name] for name in HEADLINES}


def _mean_over_targets(values_BT: Array) -> Array:
    """The mean over the targets with a defined value."""
    return ratio(np.nan_to_num(values_BT).sum(1), (~np.isnan(values_BT)).sum(1))


def _mean_error(lengths: Array, predicted: Array) -> float:
    known = ~np.isnan(lengths)
    return float(np.abs(lengths - predicted)[known].mean()) if known.any() else float("nan")


def _medians(lengths: Array) -> Array:
    """Each target's median (T,) over the evaluated answers themselves, hence with hindsight."""
    columns = [column[~np.isnan(column)] for column in lengths.T]
    return np.array([np.median(column) if len(column) else np.nan for column in columns])
