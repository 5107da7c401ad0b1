"""The time that a task still takes, on made-up clocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prefill_router.common.task_pace import TaskPace

ROWS, WAVES = 16, 20


@pytest.mark.parametrize("start_s", [0.0, 8.0, 88.0])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("wave_s", [[4.0, 4.0], [2.0, 6.0], [6.0, 2.0], [0.01, 0.01]])
def test_after_a_tenth_of_the_work_it_is_off_by_a_factor_of_two_at_most(
    start_s: float, workers: int, wave_s: list[float]
) -> None:
    """However long the workers took to start: right after parts ended, and right before the next ones do."""
    now = 0.0
    pace = TaskPace(WAVES * workers * ROWS, workers, lambda: now)
    ends_s = (start_s + np.cumsum(wave_s * (WAVES // 2))).tolist()
    for end_s, next_s in itertools.pairwise(ends_s[:-1]):  # until one part is left
        now = end_s
        for _ in range(workers):
            pace.add(ROWS)
            is_known = pace.rows > workers * ROWS
            assert (pace.eta_s is not None) == is_known
        for now in (end_s, 0.01 * end_s + 0.99 * next_s):
            assert not is_known or 0.5 <= (pace.eta_s or 0.0) / (ends_s[-1] - now) <= 2.0


def finished(at_s: list[float], rows: int, clock: list[float], total: int = 1000, skipped: int = 0) -> TaskPace:
    """A task of one worker whose parts ended at these times; `clock` holds the time."""
    pace = TaskPace(total, clock=lambda: clock[-1])
    pace.skip(skipped)
    for end_s in at_s:
        clock.append(end_s)
        pace.add(rows)
    return pace


def test_rows_of_an_earlier_run_are_no_work_of_this_one() -> None:
    pace = finished([60.0, 61.0, 62.0], rows=10, clock=[0.0], skipped=900)
    assert pace.done == "930/1,000"
    assert pace.eta == "ETA 0:00:07"


def test_a_part_that_takes_longer_than_the_others_lowers_the_rate() -> None:
    pace = finished([30.0, 31.0], rows=10, clock=(clock := [0.0]))
    assert pace.rows_per_s == 10.0
    clock.append(70.0)
    assert pace.rows_per_s == 0.5
