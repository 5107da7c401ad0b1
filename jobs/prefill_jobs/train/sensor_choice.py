"""Chooses the encoders that a router reads, and how deep: each has to earn what it costs to serve.

Encoders are added one at a time. The next one is the cheapest whose squared error is within one standard error of the
lowest; it is kept if it lowers the error by more than one standard error. Errors are paired by prompt and are those of
a kernel machine on a sample, the same for every choice: on the validation prompts, and on its own, each left out.
"""

# N prompts, M prompts to fit to, T targets, F features

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.train.kernel_sample import sample_rows
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.predictor.kernel_ridge import fit_and_leave_one_out
from prefill_router.probe.layer_scores import LayerProbe, joint_columns
from prefill_router.probe.projection import Projection

DEPTHS = (0.5, 0.75, 1.0)  # shares of an encoder's layers down to which columns are tried
_TRAINING_ROWS, _VALIDATION_ROWS = 2048, 4096

Array = NDArray[Any]
Errors = NDArray[np.float64]  # squared error of each prompt, averaged over its answers


@dataclass(frozen=True)
class SensorOption:
    """An encoder with the columns to read of it."""

    encoder: str
    columns: tuple[ActivationColumn, ...]
    encode_ms: float  # of a prompt, down to the deepest of these columns

    def __str__(self) -> str:
        return f"{' and '.join(column.name for column in self.columns)}, {self.encode_ms:.3g} ms a prompt"


@dataclass(frozen=True)
class SensorTrial:
    """An encoder that was kept or left out, and by how much it changed the squared error."""

    option: SensorOption
    is_kept: bool
    error: float
    gain: float
    standard_error: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "columns": [column.name for column in self.option.columns],
            "encode_ms": self.option.encode_ms,
            "is_kept": self.is_kept,
            "error": self.error,
            "gain": self.gain,
            "standard_error": self.standard_error,
        }


def options_of(probes: Sequence[LayerProbe], encode_ms: Mapping[ActivationColumn, float]) -> list[SensorOption]:
    """The options of every encoder: its best columns down to each of DEPTHS."""
    by_encoder: dict[str, list[LayerProbe]] = {}
    for probe in probes:
        by_encoder.setdefault(probe.column.encoder, []).append(probe)
    options: dict[tuple[ActivationColumn, ...], SensorOption] = {}
    for encoder, own in by_encoder.items():
        deepest = max(probe.column.layer for probe in own)
        for depth in DEPTHS:
            above = [probe for probe in own if probe.column.layer <= depth * deepest]
            if above:
                columns = tuple(joint_columns(above))
                options[columns] = SensorOption(encoder, columns, max(encode_ms[column] for column in columns))
    return list(options.values())


def choose_options(
    options: Sequence[SensorOption], errors_of: Callable[[Sequence[SensorOption]], Errors], max_encode_ms: float | None
) -> list[SensorTrial]:
    """Adds encoders while they pay, as the module says; the last trial may be one that was left out.

    Raises UserError if `max_encode_ms` permits no option.
    """
    limit = np.inf if max_encode_ms is None else max_encode_ms
    kept: list[SensorOption] = []
    trials: list[SensorTrial] = []
    before = errors_of([])
    while permitted := [
        option
        for option in options
        if option.encoder not in {each.encoder for each in kept}
        and option.encode_ms + sum(each.encode_ms for each in kept) <= limit
    ]:
        errors = [errors_of([*kept, option]) for option in permitted]
        best = min(errors, key=np.mean)
        near = [i for i, own in enumerate(errors) if _mean(own - best) <= _standard_error(own - best)]
        chosen = min(near, key=lambda i: permitted[i].encode_ms)
        gain = before - errors[chosen]
        is_kept = not kept or _mean(gain) > _standard_error(gain)
        trials.append(
            SensorTrial(permitted[chosen], is_kept, _mean(errors[chosen]), _mean(gain), _standard_error(gain))
        )
        if not is_kept:
            break
        kept.append(permitted[chosen])
        before = errors[chosen]
    if not kept:
        least = min(options, key=lambda option: option.encode_ms)
        raise UserError(f"--max-encode-ms {max_encode_ms:g} permits no encoder: the fastest takes {least}")
    return trials


@doing("choosing among encoders")
def choose_sensors(
    training: GradedStore,
    validation: GradedStore,
    options: Sequence[SensorOption],
    projections: Sequence[Projection],
    max_encode_ms: float | None,
) -> list[SensorTrial]:
    """Chooses among `options`, whose columns `projections` project. Raises UserError as `choose_options` does."""
    fitted = sample_rows(training.of_pool(), projections, _TRAINING_ROWS)
    judged = sample_rows(validation.of_pool(), projections, _VALIDATION_ROWS)
    ends = np.cumsum([projection.num_features for projection in projections])
    features = dict(zip((p.column for p in projections), np.split(np.arange(ends[-1]), ends[:-1]), strict=True))

    def errors_of(tried: Sequence[SensorOption]) -> Errors:
        own = [features[column] for option in tried for column in option.columns]
        which = np.concatenate(own) if own else np.zeros(0, np.int64)
        return squared_errors(fitted.features[:, which], fitted.correct, judged.features[:, which], judged.correct)

    trials = choose_options(options, errors_of, max_encode_ms)
    for line in _lines(trials):
        say(f"train: {line}")
    return trials


def squared_errors(features: Array, correct: Array, judged_features: Array, judged_correct: Array) -> Errors:
    """The squared errors (M + N,) of a kernel machine on the prompts (M, F) that it is fitted to, each left out, and on
    judged ones (N, F).

    Answers are (M, T) and (N, T), NaN where missing. Without features, the prediction is each target's mean.
    """
    answers = np.concatenate([correct, judged_correct])
    if features.shape[1]:
        machine, left_out = fit_and_leave_one_out(np.ascontiguousarray(features), [correct])
        p_correct = np.concatenate([left_out, machine(np.ascontiguousarray(judged_features))]).clip(0.0, 1.0)
    else:
        p_correct = np.nan_to_num(np.nanmean(correct, axis=0), nan=0.5)[None]
    return np.asarray(np.nanmean(np.square(answers - p_correct), axis=1), np.float64)


def _lines(trials: Sequence[SensorTrial]) -> Iterator[str]:
    for trial in trials:
        change = f"{-trial.gain:+.4f} with a standard error of {trial.standard_error:.4f}"
        yield f"{'read' if trial.is_kept else 'leave out'} {trial.option}: squared error {trial.error:.4f}, {change}"


def _mean(values: Errors) -> float:
    return float(values.mean())


def _standard_error(values: Errors) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
