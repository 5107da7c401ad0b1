"""Gauges of a job stay told while it does nothing, as the alert on jobs that stand still wants it."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
from ray.util.metrics import Gauge

from prefill_jobs import metrics
from prefill_jobs.metrics import JobMetrics
from serving import wait_until


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What gauges were set to, in turn."""
    values: list[tuple[str, float]] = []
    monkeypatch.setattr(metrics, "_TELL_EVERY_S", 0.01)
    monkeypatch.setattr(Gauge, "set", lambda gauge, value: values.append((gauge.info["name"], value)))
    return values


def test_a_job_that_stands_still_is_told_of_again(told: list[tuple[str, float]]) -> None:
    job = JobMetrics("extract")
    job.begin(3)
    (begun,) = {value for name, value in told if name == "prefill_router_job_last_commit_seconds"}
    wait_until(lambda: told.count(("prefill_router_job_running", 1.0)) > 3, "told of again", 30)
    assert told.count(("prefill_router_job_last_commit_seconds", begun)) > 2
    job.remain(0)
    wait_until(lambda: told.count(("prefill_router_job_running", 0.0)) > 3, "told of its end", 30)


def test_a_job_that_is_gone_is_not_told_of(told: list[tuple[str, float]]) -> None:
    job = JobMetrics("extract")
    job.begin(3)
    alive = weakref.ref(job)
    del job
    wait_until(lambda: gc.collect() is not None and alive() is None, "gone", 30)
    time.sleep(0.1)
    told.clear()
    time.sleep(0.1)
    assert not told
