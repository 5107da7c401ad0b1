"""Scores a router, every single target and every baseline on the same held-out prompts and bootstrap draws."""

# N prompts, T targets, B draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.evaluation.learning_curve import LearningCurve, Score
from prefill_router.metrics import (
    Interval,
    RoutingScores,
    Scorer,
    bootstrap_weights,
    completeness_weights,
    expected_calibration_error,
    interval_from_draws,
    reliability_curve,
    risk_coverage_curve,
)
from prefill_router.metrics.discrimination import ratio
from prefill_router.metrics.scores import ROUNDING
from prefill_router.policy.pool import Pool
from prefill_router.policy.selection import choose

Array = NDArray[Any]

NUM_DRAWS = 500
_LEARNING_DRAWS = 100
_CURVE_POINTS = 300  # most points of a curve in a report; areas use all of them
_BAND_POINTS = 40
_ECE_SIMULATIONS = 20

# The metrics with an interval: fields of RoutingScores, and means over targets.
HEADLINES = (
    "accuracy",
    "cost",
    "efficacy",
    "cost_saving",
    "best_efficacy",
    "saving_at_best_single",
    "p_auccc",
    "mdp_auccc",
    "apgr",
    "cpt_50",
    "cpt_80",
    "aiq",
    "arena_score",
    "aurc",
    "wrong_choices",
    "mean_auc",
    "mean_brier",
)


@dataclass(frozen=True)
class HeldOut:
    """The prompts of the held-out split and their outcomes."""

    num_tokens: Array  # (N,)
    correct: Array  # (N, T), NaN where missing
    output_tokens: Array  # (N, T), NaN where missing
    clusters: Array | None = None  # (N,) near-duplicates share a cluster; by default each prompt is its own

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


@dataclass(frozen=True)
class Standing:
    """The results of one contender."""

    name: str
    title: str
    tolerance: float
    has_hindsight: bool
    scores: RoutingScores
    intervals: dict[str, Interval]  # of HEADLINES
    router_less_this: dict[str, Interval]  # HEADLINES of the router minus these, paired; empty for the router
    curve: list[list[float]]  # (cost, accuracy)

    @property
    def is_single(self) -> bool:
        """Whether every prompt goes to one target."""
        return self.title.startswith("always ")


@dataclass(frozen=True)
class OperatingPoint:
    """The router at one tolerance, compared with the most accurate single target and with the dearest one."""

    title: str
    tolerance: float
    accuracy: Interval
    cost: Interval
    efficacy: Interval
    accuracy_less_best_single: Interval
    saving_against_best_single: Interval
    saving_against_dearest: Interval


@dataclass(frozen=True)
class CalibrationSummary:
    """The router's calibration; every list has one value per target."""

    ece: list[float]
    ece_uncalibrated: list[float]
    ece_of_chance: list[float]  # expected ECE of a perfectly calibrated router on as many prompts
    reliability: dict[str, list[list[list[float]]]]  # "uncalibrated" and "calibrated": rows of reliability_curve

    @property
    def unchanged(self) -> list[bool]:
        """Whether calibration left P(correct) of each target unchanged."""
        before, after = (self.reliability[name] for name in ("uncalibrated", "calibrated"))
        return [old == new for old, new in zip(before, after, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """The content of an evaluation report. Costs are USD per prompt."""

    pool: str
    targets: list[str]
    router_version: str
    tolerance: float
    num_held_out: int
    num_complete: int  # held-out prompts with an outcome for every target
    num_seen: int  # prompts left out because they were used in training
    accuracy_of_complete: float  # the router's on complete prompts, without completeness weights
    standings: list[Standing]  # the router first
    band: list[list[float]]  # interval of the router's curve: (cost, low accuracy, high accuracy)
    operating_points: list[OperatingPoint]
    target_accuracy: list[float]
    target_cost: list[float]
    calibration: CalibrationSummary
    risk_coverage: list[list[float]]  # of the router's choices: (coverage, share of wrong answers)
    length_error_tokens: float  # mean absolute error of the router's predicted answer lengths
    length_error_median_rule_tokens: float  # the same if each target's median length is predicted
    num_draws: int
    about: dict[str, str] = field(default_factory=dict)  # sources, split and versions, for display
    learning: LearningCurve | None = None  # of the kernel machine; None if not requested

    @property
    def router(self) -> RoutingScores:
        return self.standings[0].scores

    @property
    def baselines(self) -> list[Standing]:
        """The standings of the baselines, without the router, single targets and the oracle."""
        return [s for s in self.standings[1:] if not s.has_hindsight and not s.is_single]

    def standing(self, name: str) -> Standing | None:
        return next((standing for standing in self.standings if standing.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON: undefined values are null, and an interval is [value, low, high]."""
        return finite({**asdict(self), "router": asdict(self.router)})  # type: ignore[no-any-return]


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
    num_draws: int = NUM_DRAWS,
    about: dict[str, str] | None = None,
) -> Evaluation:
    """Scores a router and its baselines.

    Targets are chosen by expected cost; costs are counted from actual answer lengths, or from the router's expected
    length where the actual one is unknown. `p_uncalibrated` and `median_output_tokens` (N, T) are the router's, if they
    differ from those of its choice. Complete prompts are weighted by `completeness_weights`, with the router's mean
    P(correct) as difficulty. Raises UserError if there are no held-out prompts, or none is complete.
    """
    if not len(held_out):
        raise UserError(
            "no held-out prompt with outcomes: every prompt of this store was used in training: "
            "extract and grade new prompts"
        )
    trial = _Trial(pool, held_out, router, num_draws)
    choice = choose(router.p_correct, trial.expected(router), router.tolerance)
    complete = np.flatnonzero(~np.isnan(trial.correct).any(1))
    achieved, confidence = (values[complete, choice[complete]] for values in (trial.correct, router.p_correct))
    target_cost, target_accuracy = trial.singles()
    medians = router.expected_output_tokens if median_output_tokens is None else median_output_tokens
    return Evaluation(
        pool=pool.name,
        targets=pool.target_names,
        router_version=version,
        tolerance=router.tolerance,
        num_held_out=len(held_out),
        num_complete=len(complete),
        num_seen=num_seen,
        accuracy_of_complete=float(achieved.mean()),
        standings=[trial.router(router), *(trial.baseline(contender) for contender in baselines)],
        band=trial.band(),
        operating_points=trial.operating_points(router.tolerance),
        target_accuracy=target_accuracy,
        target_cost=target_cost,
        calibration=_calibration(
            trial.correct, router.p_correct, router.p_correct if p_uncalibrated is None else p_uncalibrated
        ),
        risk_coverage=thinned(risk_coverage_curve(achieved, confidence)).tolist(),
        length_error_tokens=_mean_error(held_out.output_tokens, medians),
        length_error_median_rule_tokens=_mean_error(held_out.output_tokens, _medians(held_out.output_tokens)),
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
    trial = _Trial(pool, held_out, router, num_draws)

    def score(p_correct: Array) -> dict[str, Array]:
        headlines = trial.headlines(replace(router, p_correct=p_correct))
        return {name: headlines[name] for name in ("mean_auc", "mdp_auccc")}

    return score


class _Trial:
    """Scores contenders on the same prompts, weights and draws. The first draw takes every prompt once."""

    def __init__(self, pool: Pool, held_out: HeldOut, router: Contender, num_draws: int) -> None:
        self.pool, self.held_out = pool, held_out
        self.correct = held_out.correct.astype(np.float64)
        known = ~np.isnan(held_out.output_tokens)
        lengths = np.where(known, held_out.output_tokens, router.expected_output_tokens)
        self.paid = pool.expected_cost(held_out.num_tokens, lengths)
        self._weights = completeness_weights(self.correct, router.p_correct.mean(1))
        drawn = bootstrap_weights(len(held_out), num_draws, clusters=held_out.clusters)
        self._draws = np.concatenate([np.ones((1, len(held_out)), drawn.dtype), drawn])
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

    def operating_points(self, own_tolerance: float) -> list[OperatingPoint]:
        """The router at its own tolerance, and at the cheapest tolerance that reaches each reference accuracy."""
        best = self._router_figures["best_single_accuracy"][0]
        accuracies = {
            "highest accuracy": self._router.curve()[:, 2].max(),
            "accuracy of the best single target": best,
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
            saving_against_best_single=interval_from_draws(1.0 - ratio(costs, figures["best_single_cost"])),
            saving_against_dearest=interval_from_draws(1.0 - ratio(costs, self._dearest_cost)),
        )


def _headlines(figures: dict[str, Array]) -> dict[str, Array]:
    means = {f"mean_{name}": _mean_over_targets(figures[name]) for name in ("auc", "brier")}
    return {name: {**figures, **means}[name] for name in HEADLINES}


def _mean_over_targets(values_BT: Array) -> Array:
    """The mean over the targets with a defined value."""
    return ratio(np.nan_to_num(values_BT).sum(1), (~np.isnan(values_BT)).sum(1))


# --- calibration and lengths -----------------------------------------------------------------------------------------


def _calibration(correct: Array, p: Array, p_before: Array | None) -> CalibrationSummary:
    p_uncalibrated = p if p_before is None else p_before
    rng = np.random.default_rng(0)
    return CalibrationSummary(
        ece=[expected_calibration_error(y, said) for y, said in _graded(correct, p)],
        ece_uncalibrated=[expected_calibration_error(y, said) for y, said in _graded(correct, p_uncalibrated)],
        ece_of_chance=[_ece_of_chance(said, rng) for _, said in _graded(correct, p)],
        reliability={
            name: [reliability_curve(y, said).tolist() for y, said in _graded(correct, values)]
            for name, values in (("uncalibrated", p_uncalibrated), ("calibrated", p))
        },
    )


def _ece_of_chance(p: Array, rng: np.random.Generator) -> float:
    """The mean ECE of outcomes simulated from the predictions."""
    return float(np.mean([expected_calibration_error(rng.random(len(p)) < p, p) for _ in range(_ECE_SIMULATIONS)]))


def _graded(correct: Array, p: Array) -> list[tuple[Array, Array]]:
    """The known outcomes of each target, with their predictions."""
    return [(y[~np.isnan(y)], p_t[~np.isnan(y)]) for y, p_t in zip(correct.T, p.T, strict=True)]


def _mean_error(lengths: Array, predicted: Array) -> float:
    known = ~np.isnan(lengths)
    return float(np.abs(lengths - predicted)[known].mean()) if known.any() else float("nan")


def _medians(lengths: Array) -> Array:
    """Each target's median (T,) over the evaluated answers themselves, hence with hindsight."""
    columns = [column[~np.isnan(column)] for column in lengths.T]
    return np.array([np.median(column) if len(column) else np.nan for column in columns])


def thinned(rows: Array, num_rows: int = _CURVE_POINTS) -> Array:
    """At most `num_rows` evenly spaced rows, including the first and the last."""
    if len(rows) <= num_rows:
        return rows
    return np.asarray(rows[np.unique(np.linspace(0, len(rows) - 1, num_rows).round().astype(int))])


def finite(value: Any) -> Any:
    """A copy of a JSON value in which NaN and infinite numbers are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
