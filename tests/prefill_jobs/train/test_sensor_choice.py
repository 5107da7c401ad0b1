"""Tests of the choice of encoders: what is added, what is left out, and what the limit permits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from prefill_jobs.train.sensor_choice import Errors, SensorOption, choose_options, options_of
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.probe.layer_scores import LayerProbe

SLOW = SensorOption("slow", (ActivationColumn("last", 8, "slow"),), 20.0)
HALF = SensorOption("slow", (ActivationColumn("last", 4, "slow"),), 10.0)
FAST = SensorOption("fast", (ActivationColumn("sentence", 2, "fast"),), 1.0)
NOISE = np.array([0.02, -0.02] * 50)


def errors_by(values: dict[tuple[SensorOption, ...], float]) -> object:
    """Squared errors of 100 prompts with these means; noise differs by the number of encoders."""

    def errors_of(tried: Sequence[SensorOption]) -> Errors:
        return np.asarray(values[tuple(tried)] + 0.2 + NOISE * len(tried))

    return errors_of


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        # A tie within one standard error (0.002) goes to the faster encoder, and the second one adds too little.
        ({(): 0.1, (SLOW,): 0.0, (HALF,): 0.0, (FAST,): 0.0, (FAST, SLOW): -0.001, (FAST, HALF): -0.001}, [FAST]),
        # The second encoder adds more than a standard error, at half depth as much as at full depth.
        ({(): 0.1, (SLOW,): 0.05, (HALF,): 0.05, (FAST,): 0.0, (FAST, SLOW): -0.03, (FAST, HALF): -0.03}, [FAST, HALF]),
        # The best encoder first, whatever it costs.
        ({(): 0.1, (SLOW,): 0.0, (HALF,): 0.05, (FAST,): 0.09, (SLOW, FAST): 0.0}, [SLOW]),
    ],
)
def test_an_encoder_is_read_if_it_pays(values: dict[tuple[SensorOption, ...], float], kept: list[SensorOption]) -> None:
    trials = choose_options([SLOW, HALF, FAST], errors_by(values), None)  # type: ignore[arg-type]
    assert [trial.option for trial in trials if trial.is_kept] == kept
    assert all(not trial.is_kept for trial in trials[len(kept) :])


def test_encoders_together_stay_within_the_limit() -> None:
    values = {(): 0.1, (HALF,): 0.0, (FAST,): 0.05, (HALF, FAST): -0.05}
    assert [t.option for t in choose_options([SLOW, HALF, FAST], errors_by(values), 10.5)] == [HALF]  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"--max-encode-ms 0.5 permits no encoder: the fastest takes fast:sentence_002, 1"
    ):
        choose_options([SLOW, HALF, FAST], errors_by(values), 0.5)  # type: ignore[arg-type]


def test_options_are_the_best_columns_down_to_each_depth() -> None:
    j_by_column = {("last", 2): 0.1, ("last", 4): 0.2, ("last", 8): 0.3, ("mean", 2): 0.1, ("mean", 8): 0.1}
    columns = {ActivationColumn(pooling, layer, "deep"): j for (pooling, layer), j in j_by_column.items()}  # type: ignore[arg-type]
    columns[ActivationColumn("sentence", 6, "flat")] = 0.1
    probes = [LayerProbe("model", column, "target", 1.0, j, j, j, j, 100, 0.5) for column, j in columns.items()]
    options = options_of(probes, {column: float(column.layer) for column in columns})
    found = {option.encoder: [] for option in options}
    for option in options:
        found[option.encoder].append(([column.name for column in option.columns], option.encode_ms))
    assert found == {
        "deep": [(["deep:last_004", "deep:mean_002"], 4.0), (["deep:last_008", "deep:mean_002"], 8.0)],
        "flat": [(["flat:sentence_006"], 6.0)],
    }
