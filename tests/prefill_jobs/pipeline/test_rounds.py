"""Rounds of a pipeline: a failed one does not end them, SIGTERM does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from prefill_jobs.option_fields import seconds
from prefill_jobs.pipeline import rounds
from prefill_jobs.pipeline.rounds import run_every
from prefill_router.common.errors import UserError


@pytest.fixture(autouse=True)
def restored_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_rounds_go_on_after_a_failure_and_end_with_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    ways = iter([UserError("gate: the new router is worse"), RuntimeError("a bug"), None])

    def run() -> None:
        if (problem := next(ways)) is not None:
            raise problem
        terminate()

    run_every(run, 0.0)
    err = capsys.readouterr().err
    assert "round failed, the next one follows on schedule: gate: the new router is worse" in err
    assert "RuntimeError: a bug" in err
    assert err.endswith("pipeline: stopped\n")


def test_rounds_start_on_schedule_and_sigterm_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [100.0], []

    def wait(wait_s: float) -> None:
        waits.append(wait_s)
        now[0] += wait_s
        if len(waits) == 3:
            terminate()

    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))
    took_s = iter([20.0, 90.0, 30.0])

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray replaces the handler
        now[0] += next(took_s)

    run_every(run, 60.0)
    assert waits == [40.0, 0.0, 30.0]


@pytest.mark.parametrize(("text", "expected_s"), [("90s", 90), ("30m", 1800), ("6h", 21600), ("1.5d", 129600)])
def test_durations(text: str, expected_s: float) -> None:
    assert seconds(text) == expected_s
