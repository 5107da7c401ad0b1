"""Gauges of an idle job stay exported, which the alert on stalled jobs requires."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from ray.util.metrics import Gauge

from prefill_jobs.runtime.job_metrics import JobMetrics, TrainMetrics
from prefill_router.common.gauges import REFRESHER, KeptGauge


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """The values set on gauges, in order."""
    values: list[tuple[Any, float]] = []
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, _tags=None: values.append((gauge, value)))
    return values


def refreshed(told: list[tuple[Any, float]], holder: object) -> dict[str, float]:
    """The values that an idle object's gauges are exported with, by name; each is set once."""
    told.clear()
    REFRESHER.refresh()
    gauges = [member.gauge for member in vars(holder).values() if isinstance(member, KeptGauge)]
    ours = [(gauge.info["name"].removeprefix("prefill_router_"), value) for gauge, value in told if gauge in gauges]
    assert len(ours) == len(dict(ours))
    return dict(ours)


def test_a_job_that_stands_still_is_told_of_again(told: list[tuple[Any, float]]) -> None:
    job = JobMetrics("extract")
    job.begin(3)
    (begun,) = {value for gauge, value in told if gauge.info["name"] == "prefill_router_job_last_commit_seconds"}
    for _ in range(3):
        expected = {"job_running": 1.0, "job_last_commit_seconds": begun, "job_backlog_rows": 3}
        assert refreshed(told, job) == expected
    job.remain(0)
    assert refreshed(told, job)["job_running"] == 0.0


def test_a_training_is_told_of_again_between_epochs(told: list[tuple[Any, float]]) -> None:
    training = TrainMetrics()
    training.epoch(7, 0.5)
    assert refreshed(told, training) == {"train_epoch": 7, "train_validation_loss": 0.5}


def test_a_job_that_is_gone_is_not_told_of(told: list[tuple[Any, float]]) -> None:
    job = JobMetrics("extract")
    job.begin(3)
    alive = weakref.ref(job)
    gauges = [gauge for gauge, _ in told]
    del job
    gc.collect()
    assert alive() is None
    told.clear()
    REFRESHER.refresh()
    assert not [gauge for gauge, _ in told if gauge in gauges]
