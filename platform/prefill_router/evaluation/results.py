"""The results of an evaluation, as reports show them and report.json stores them."""

# N prompts, T targets

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.evaluation.calibration_summary import CalibrationSummary
from prefill_router.evaluation.learning_curve import LearningCurve
from prefill_router.metrics import Interval, RoutingScores

_CURVE_POINTS = 300

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


WITHOUT = "without "  # begins the title of the router where the named encoder is missing


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

    @property
    def is_reduced(self) -> bool:
        """Whether it is the router where one of its encoders is missing."""
        return self.title.startswith(WITHOUT)


@dataclass(frozen=True)
class OperatingPoint:
    """The router at one tolerance, compared with the most accurate and with the most expensive ("dearest") target."""

    title: str
    tolerance: float
    accuracy: Interval
    cost: Interval
    efficacy: Interval
    accuracy_less_best_single: Interval
    saving_against_best_single: Interval
    saved_usd: Interval  # per prompt, against the most accurate target
    saving_against_dearest: Interval


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
    num_validation: int | None  # prompts that the tolerance was chosen on, if known
    accuracy_of_complete: float  # the router's on complete prompts, without completeness weights
    standings: list[Standing]  # the router first
    band: list[list[float]]  # interval of the router's curve: (cost, low accuracy, high accuracy)
    operating_points: list[OperatingPoint]
    tolerances: list[list[float]]  # (tolerance, cost, accuracy) of points of the router's curve, evenly spaced by cost
    is_judged: bool  # some outcomes are between 0 and 1
    billed_share: float  # of the graded answers: their costs are as billed, the others by prices and lengths
    target_accuracy: list[float]
    target_cost: list[float]
    calibration: CalibrationSummary
    risk_coverage: list[list[float]]  # of the router's choices: (coverage, share of wrong answers)
    length_error_tokens: float  # mean absolute error of the router's predicted answer lengths; NaN if none is known
    length_error_median_rule_tokens: float  # the same if each target's median length is predicted
    num_draws: int
    about: dict[str, str] = field(default_factory=dict)  # sources, split and versions, for display
    learning: LearningCurve | None = None  # of the kernel machine; None if not requested

    @property
    def quality(self) -> str:
        """The word for the mean outcome."""
        return quality(is_judged=self.is_judged)

    @property
    def router(self) -> RoutingScores:
        return self.standings[0].scores

    @property
    def has_lengths(self) -> bool:
        """Whether any answer's length is known."""
        return isfinite(self.length_error_tokens)

    @property
    def baselines(self) -> list[Standing]:
        """The standings of the baselines, without single targets, the oracle, and the router itself in any form."""
        others = (s for s in self.standings[1:] if not s.is_reduced)
        return [s for s in others if not s.has_hindsight and not s.is_single]

    @property
    def reduced(self) -> list[Standing]:
        """The standings of the router where one of its encoders is missing."""
        return [s for s in self.standings if s.is_reduced]

    def standing(self, name: str) -> Standing | None:
        return next((standing for standing in self.standings if standing.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON: undefined values are null, and an interval is [value, low, high]."""
        return finite({**asdict(self), "router": asdict(self.router)})  # type: ignore[no-any-return]


def quality(*, is_judged: bool) -> str:
    """The word for the mean outcome: outcomes are right or wrong, or else rewards between 0 and 1."""
    return "mean reward" if is_judged else "accuracy"


def thinned(rows: NDArray[Any], num_rows: int = _CURVE_POINTS) -> NDArray[Any]:
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
