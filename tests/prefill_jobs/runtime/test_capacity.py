"""The peak of a job's workers, including workers that join or end."""

from __future__ import annotations

import pytest

from prefill_jobs.runtime import progress
from prefill_jobs.runtime.capacity import Capacity, Effort
from prefill_router.encoder.prefill_work import Work

PEAK = 100.0


def report(capacity: Capacity, worker: str, worked_s: float, flops: float = 300.0, encoder_s: float = 5.0) -> Work:
    """Reports a task of a worker, finished `worked_s` after its first task began."""
    work = Work(prompts=1, tokens=7, flops=flops, seconds=encoder_s)
    capacity.add(Effort(work, worker, PEAK, worked_s))
    return work


def test_a_worker_that_takes_another_ones_place_changes_no_share() -> None:
    capacity = Capacity()
    done = report(capacity, "a", 10.0)
    assert done.flops / capacity.flops == pytest.approx(0.3)
    done += report(capacity, "b", 10.0)
    done += report(capacity, "b", 20.0)
    assert done.flops / capacity.flops == pytest.approx(0.3)
    assert capacity.encoder_flops == 3 * 5.0 * PEAK


def test_calls_of_a_worker_that_overlap_count_its_time_once() -> None:
    capacity = Capacity()
    for worked_s in (10.0, 12.0, 11.0):
        report(capacity, "a", worked_s)
    assert capacity.flops == 12.0 * PEAK


def test_a_worker_that_only_copies_has_no_peak_to_reach() -> None:
    capacity = Capacity()
    report(capacity, "a", 10.0)
    capacity.add(Effort(Work(), "copies", PEAK, 30.0))
    assert capacity.flops == 10.0 * PEAK


def test_the_line_says_the_share_of_those_that_worked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SHORT_S", 0.0)
    capacity, extraction = Capacity(), progress.Progress("extract", 2)
    with extraction.shown():
        for worker in ("a", "b"):
            extraction.add(1, report(capacity, worker, 10.0), capacity)
    assert "2/2 prompts" in (said := capsys.readouterr().err)
    assert "encoder at 60% of the hardware's peak" in said
    assert capacity.encoder_mfu(extraction.work) == pytest.approx(0.6)


def test_a_run_too_short_to_tell_says_no_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SHORT_S", 0.0)
    capacity, extraction = Capacity(), progress.Progress("extract", 1)
    with extraction.shown():
        extraction.add(1, report(capacity, "a", 10.0, encoder_s=0.9), capacity)
    assert "1/1 prompts" in (said := capsys.readouterr().err)
    assert "peak" not in said
    assert "padding" in said
