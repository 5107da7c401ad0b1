"""A router on held-out prompts, beside every single target and every baseline, all on the same prompts and draws."""

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
    interval,
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
_CURVE_POINTS = 300  # of a curve in a report; its areas are computed from all of them
_BAND_POINTS = 40
_CHANCES = 20

# What gets an interval. Means over targets are named so; the rest are fields of RoutingScores.
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
    """Prompts that training never saw, and what came of them."""

    num_tokens: Array  # (N,)
    correct: Array  # (N, T), NaN where missing
    output_tokens: Array  # (N, T), NaN where missing
    clusters: Array | None = None  # (N,) near-duplicates share one; by default each prompt is its own

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True)
class Contender:
    """What a router, or a baseline, says of the held-out prompts."""

    name: str
    title: str
    p_correct: Array  # (N, T)
    expected_output_tokens: Array  # (N, T)
    tolerance: float
    has_hindsight: bool = False  # it knows the outcomes


@dataclass(frozen=True)
class Standing:
    """How one contender did."""

    name: str
    title: str
    tolerance: float
    has_hindsight: bool
    scores: RoutingScores
    intervals: dict[str, Interval]  # of HEADLINES
    router_less_this: dict[str, Interval]  # the same of the paired differences; empty for the router
    curve: list[list[float]]  # points of (cost, accuracy)

    @property
    def is_single(self) -> bool:
        """Does it send every prompt to one target?"""
        return self.title.startswith("always ")


@dataclass(frozen=True)
class OperatingPoint:
    """What one tolerance gives. Savings are against the best single target and against the dearest one."""

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
    """Whether P(correct) can be taken at its word. Values are one a target."""

    ece: list[float]
    ece_uncalibrated: list[float]
    ece_of_chance: list[float]  # what a perfectly calibrated router would show on as many prompts
    reliability: dict[str, list[list[list[float]]]]  # before and after: each target's (mean p, accuracy, prompts)

    @property
    def unchanged(self) -> list[bool]:
        """Of which targets calibration left P(correct) as it was."""
        before, after = (self.reliability[name] for name in ("uncalibrated", "calibrated"))
        return [was == now for was, now in zip(before, after, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows. Costs are USD a prompt."""

    pool: str
    targets: list[str]
    router_version: str
    tolerance: float
    num_held_out: int
    num_complete: int  # of them, with an outcome of every target
    num_seen: int  # prompts left out because training saw them
    accuracy_of_complete: float  # the router's, if complete prompts did not stand for those that lack an outcome
    standings: list[Standing]  # the router first
    band: list[list[float]]  # of the router's curve: (cost, low accuracy, high accuracy)
    operating_points: list[OperatingPoint]
    target_accuracy: list[float]
    target_cost: list[float]
    calibration: CalibrationSummary
    risk_coverage: list[list[float]]  # of the router's choices: (coverage, share of wrong answers)
    length_error_tokens: float  # mean absolute error of the router's median lengths
    length_error_median_rule_tokens: float  # the same, of each target's median length
    num_draws: int
    about: dict[str, str] = field(default_factory=dict)  # data, split and versions, for people
    learning: LearningCurve | None = None  # of the kernel machine; None where nobody asked for it

    @property
    def router(self) -> RoutingScores:
        return self.standings[0].scores

    @property
    def baselines(self) -> list[Standing]:
        """What the router is compared with, without single targets and the oracle."""
        return [s for s in self.standings[1:] if not s.has_hindsight and not s.is_single]

    def standing(self, name: str) -> Standing | None:
        return next((standing for standing in self.standings if standing.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON: what has no value is null, and an interval is [value, low, high]."""
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
    """Scores a router and its rivals. Targets are chosen by expected cost; costs are counted from the real lengths.

    `p_uncalibrated` and `median_output_tokens` (N, T) are the router's, where they differ from what it chooses by.
    Where an answer's length is unknown, the router's expected length counts. Where outcomes are missing, complete
    prompts stand for those that are as difficult by the router's word (`completeness_weights`). Raises UserError where
    nothing is held out, or no prompt has an outcome of every target.
    """
    if not len(held_out):
        raise UserError("no held-out prompt with outcomes: every prompt of this store was used in training")
    trial = _Trial(pool, held_out, router, num_draws)
    choice = choose(router.p_correct, trial.expected(router), router.tolerance)
    complete = np.flatnonzero(~np.isnan(trial.correct).any(1))
    reached, confidence = (values[complete, choice[complete]] for values in (trial.correct, router.p_correct))
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
        accuracy_of_complete=float(reached.mean()),
        standings=[trial.router(router), *(trial.rival(contender) for contender in baselines)],
        band=trial.band(),
        operating_points=trial.operating_points(router.tolerance),
        target_accuracy=target_accuracy,
        target_cost=target_cost,
        calibration=_calibration(
            trial.correct, router.p_correct, router.p_correct if p_uncalibrated is None else p_uncalibrated
        ),
        risk_coverage=thinned(risk_coverage_curve(reached, confidence)).tolist(),
        length_error_tokens=_mean_error(held_out.output_tokens, medians),
        length_error_median_rule_tokens=_mean_error(held_out.output_tokens, _medians(held_out.output_tokens)),
        num_draws=num_draws,
        about=about or {},
    )


def oracle(held_out: HeldOut, expected_output_tokens: Array) -> Contender:
    """The cheapest target that is right, by hindsight."""
    p = np.nan_to_num(held_out.correct)
    return Contender("oracle", "oracle", p, expected_output_tokens, 0.0, has_hindsight=True)


def scoring(pool: Pool, held_out: HeldOut, router: Contender, num_draws: int = _LEARNING_DRAWS) -> Score:
    """What P(correct) of another learner comes to on these prompts, at the router's expected lengths.

    Raises UserError where no prompt has an outcome of every target.
    """
    trial = _Trial(pool, held_out, router, num_draws)

    def score(p_correct: Array) -> dict[str, Array]:
        headlines = trial.headlines(replace(router, p_correct=p_correct))
        return {name: headlines[name] for name in ("mean_auc", "mdp_auccc")}

    return score


class _Trial:
    """The prompts, weights and draws that all contenders share. The first draw takes every prompt once."""

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
        self._of_router = self._router.figures(self._draws)
        self._dearest = self._router.singles(self._draws)[0][:, self._router.dearest]  # its mean cost in each draw

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
        return self._standing(contender, self._router, _headlines(self._of_router), {})

    def headlines(self, contender: Contender) -> dict[str, Array]:
        return _headlines(self._scorer(contender).figures(self._draws))

    def rival(self, contender: Contender) -> Standing:
        scorer = self._scorer(contender)
        headlines = _headlines(scorer.figures(self._draws))
        differences = {name: values - headlines[name] for name, values in _headlines(self._of_router).items()}
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
            intervals={name: _interval(values) for name, values in headlines.items()},
            router_less_this={name: _interval(values) for name, values in differences.items()},
            curve=thinned(scorer.curve()[::-1, 1:]).tolist(),
        )

    def band(self) -> list[list[float]]:
        """Points (cost, low accuracy, high accuracy) along the router's curve, by ascending cost."""
        tolerances = thinned(self._router.curve()[:, 0], _BAND_POINTS)
        costs, accuracies = self._router.points_at(tolerances, self._draws)
        ends = [_interval(values) for values in accuracies.T]
        return sorted([float(cost), end.low, end.high] for cost, end in zip(costs[0], ends, strict=True))

    def operating_points(self, own_tolerance: float) -> list[OperatingPoint]:
        """The router's own tolerance, and those at which its curve is usually read."""
        best = self._of_router["best_single_accuracy"][0]
        wanted = {
            "the most accurate": self._router.curve()[:, 2].max(),
            "as accurate as the best single target": best,
            "within 1 point of it": best - 0.01,
            "within 3 points of it": best - 0.03,
        }
        points = [self._operating_point("the router's own tolerance", own_tolerance)]
        for title, accuracy in wanted.items():
            if (tolerance := self._router.tolerance_reaching(accuracy)) is not None:
                points.append(self._operating_point(title, tolerance))
        return points

    def _operating_point(self, title: str, tolerance: float) -> OperatingPoint:
        costs, accuracies = (values[:, 0] for values in self._router.points_at([tolerance], self._draws))
        of = self._of_router
        gained = accuracies - of["best_single_accuracy"]
        headroom = of["oracle_accuracy"] - of["best_single_accuracy"]
        return OperatingPoint(
            title=title,
            tolerance=tolerance,
            accuracy=_interval(accuracies),
            cost=_interval(costs),
            efficacy=_interval(ratio(gained, np.where(headroom > ROUNDING, headroom, 0.0))),
            accuracy_less_best_single=_interval(gained),
            saving_against_best_single=_interval(1.0 - ratio(costs, of["best_single_cost"])),
            saving_against_dearest=_interval(1.0 - ratio(costs, self._dearest)),
        )


def _headlines(figures: dict[str, Array]) -> dict[str, Array]:
    means = {f"mean_{name}": _mean_over_targets(figures[name]) for name in ("auc", "brier")}
    return {name: {**figures, **means}[name] for name in HEADLINES}


def _mean_over_targets(values_BT: Array) -> Array:
    """The mean over those targets that have a value."""
    return ratio(np.nan_to_num(values_BT).sum(1), (~np.isnan(values_BT)).sum(1))


def _interval(values: Array) -> Interval:
    """Of a figure's values: the first of all prompts, the others of the draws."""
    return interval(float(values[0]), values[1:])


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
    """The mean error of outcomes that are drawn from the predictions themselves."""
    return float(np.mean([expected_calibration_error(rng.random(len(p)) < p, p) for _ in range(_CHANCES)]))


def _graded(correct: Array, p: Array) -> list[tuple[Array, Array]]:
    """Of each target, the outcomes that are known and what was said of them."""
    return [(y[~np.isnan(y)], said[~np.isnan(y)]) for y, said in zip(correct.T, p.T, strict=True)]


def _mean_error(lengths: Array, predicted: Array) -> float:
    known = ~np.isnan(lengths)
    return float(np.abs(lengths - predicted)[known].mean()) if known.any() else float("nan")


def _medians(lengths: Array) -> Array:
    """Each target's median (T,), with hindsight: of the very answers that it is judged on."""
    columns = [column[~np.isnan(column)] for column in lengths.T]
    return np.array([np.median(column) if len(column) else np.nan for column in columns])


def thinned(rows: Array, num_rows: int = _CURVE_POINTS) -> Array:
    """At most so many rows, evenly chosen, the first and the last among them."""
    if len(rows) <= num_rows:
        return rows
    return np.asarray(rows[np.unique(np.linspace(0, len(rows) - 1, num_rows).round().astype(int))])


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
