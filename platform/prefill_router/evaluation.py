"""A router on held-out prompts, beside the single targets and a nearest-neighbour baseline, all on the same prompts."""

# N prompts, T targets

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.errors import UserError
from prefill_router.metrics import (
    RoutingScores,
    cost_coverage_curve,
    expected_calibration_error,
    reliability_curve,
    score_routing,
)
from prefill_router.pool import Pool

Array = NDArray[Any]

_CURVE_POINTS = 1000  # of a curve in a report; its areas are computed from all of them


@dataclass(frozen=True)
class HeldOut:
    """Prompts that training never saw, with what each side says of them."""

    num_tokens: Array  # (N,)
    correct: Array  # (N, T), NaN where missing
    output_tokens: Array  # (N, T), NaN where missing
    p_correct: Array  # (N, T)
    p_uncalibrated: Array  # (N, T)
    expected_output_tokens: Array  # (N, T)
    knn_p_correct: Array | None  # (N, T); None where no training prompt was at hand


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows. Costs are USD a prompt."""

    pool: str
    targets: list[str]
    router_version: str
    tolerance: float
    num_held_out: int
    num_seen: int  # prompts left out because training saw them
    router: RoutingScores
    knn: RoutingScores | None
    target_accuracy: list[float]
    target_cost: list[float]
    curves: dict[str, list[list[float]]]  # points of (cost, accuracy) by router
    ece_uncalibrated: list[float]  # a value a target; the router's own scores are those after calibration
    reliability: dict[str, list[list[list[float]]]]  # before and after: each target's (mean p, accuracy, prompts)
    length_error_tokens: float  # mean absolute error of the expected output tokens
    length_error_median_rule_tokens: float  # the same, of each target's median length

    def to_json(self) -> dict[str, Any]:
        """As JSON: what has no value is null."""
        return finite(asdict(self))  # type: ignore[no-any-return]


def evaluate(pool: Pool, version: str, tolerance: float, held_out: HeldOut, num_seen: int) -> Evaluation:
    """Scores a router at `tolerance`. Targets are chosen by expected cost; costs are counted from the real lengths.

    Where an answer's length is unknown, its expected length counts. Raises UserError where nothing is held out, or no
    prompt has an outcome of every target.
    """
    if not len(held_out.num_tokens):
        raise UserError("no held-out prompt with outcomes: every prompt of this store was used in training")
    expected = pool.expected_cost(held_out.num_tokens, held_out.expected_output_tokens)
    lengths = np.where(np.isnan(held_out.output_tokens), held_out.expected_output_tokens, held_out.output_tokens)
    paid = pool.expected_cost(held_out.num_tokens, lengths)
    correct = held_out.correct.astype(np.float64)
    complete = ~np.isnan(correct).any(1)
    routers = {"router": held_out.p_correct, "knn": held_out.knn_p_correct}
    curves = {n: cost_coverage_curve(correct, p, expected, paid) for n, p in routers.items() if p is not None}
    knn = held_out.knn_p_correct
    return Evaluation(
        pool=pool.name,
        targets=pool.target_names,
        router_version=version,
        tolerance=tolerance,
        num_held_out=len(correct),
        num_seen=num_seen,
        router=score_routing(correct, held_out.p_correct, expected, tolerance, paid),
        knn=None if knn is None else score_routing(correct, knn, expected, 0.0, paid),
        target_accuracy=correct[complete].mean(0).tolist(),
        target_cost=paid[complete].mean(0).tolist(),
        curves={name: _thinned(curve).tolist() for name, curve in curves.items()},
        ece_uncalibrated=[expected_calibration_error(y, p) for y, p in _graded(correct, held_out.p_uncalibrated)],
        reliability={
            "uncalibrated": _reliability(correct, held_out.p_uncalibrated),
            "calibrated": _reliability(correct, held_out.p_correct),
        },
        length_error_tokens=_mean_error(held_out.output_tokens, held_out.expected_output_tokens),
        length_error_median_rule_tokens=_mean_error(held_out.output_tokens, _medians(held_out.output_tokens)),
    )


def _graded(correct: Array, p: Array) -> list[tuple[Array, Array]]:
    """Of each target, the outcomes that are known and what was said of them."""
    return [(y[~np.isnan(y)], said[~np.isnan(y)]) for y, said in zip(correct.T, p.T, strict=True)]


def _reliability(correct: Array, p: Array) -> list[list[list[float]]]:
    return [reliability_curve(y, said).tolist() for y, said in _graded(correct, p)]


def _mean_error(lengths: Array, predicted: Array) -> float:
    known = ~np.isnan(lengths)
    return float(np.abs(lengths - predicted)[known].mean()) if known.any() else float("nan")


def _medians(lengths: Array) -> Array:
    """Each target's median (T,), with hindsight: of the very answers that it is judged on."""
    columns = [column[~np.isnan(column)] for column in lengths.T]
    return np.array([np.median(column) if len(column) else np.nan for column in columns])


def _thinned(curve: Array) -> Array:
    if len(curve) <= _CURVE_POINTS:
        return curve
    return np.asarray(curve[np.unique(np.linspace(0, len(curve) - 1, _CURVE_POINTS).round().astype(int))])


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
