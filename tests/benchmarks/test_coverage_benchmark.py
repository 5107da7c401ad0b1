"""The coverage benchmark itself: that it tells right intervals from wrong ones, in a few repetitions."""

from __future__ import annotations

import json

import pytest

from benchmarks import coverage
from prefill_router.metrics import Interval

SMALL = ["--repetitions", "30", "--prompts", "300", "--draws", "60", "--truth", "20000"]


def shares(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    coverage.main(SMALL)
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1])["coverage"])


def test_most_intervals_hold_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    found = shares(capsys)
    assert len(found) == 2 * len(coverage.FIGURES)
    assert min(found.values()) > 0.75


def test_intervals_of_half_the_width_are_found_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = coverage.interval

    def narrow(value: float, drawn: object) -> Interval:
        _, low, high = honest(value, drawn)
        middle, half = (low + high) / 2, (high - low) / 4
        return Interval(value, middle - half, middle + half)

    monkeypatch.setattr(coverage, "interval", narrow)
    assert sum(shares(capsys).values()) / (2 * len(coverage.FIGURES)) < 0.8
