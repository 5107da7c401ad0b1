"""The frontier of quality, cost and time, on a log whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_router.evaluation.latency_frontier import latency_frontier, target_latency_s
from prefill_router.evaluation.off_policy import Log

P = np.tile([0.9, 0.6, 0.5], (6, 1))  # the best target is the slowest
COST = np.tile([3.0, 2.0, 1.0], (6, 1))
CHOSEN = np.array([0, 0, 1, 1, 2, -1])
TIMES = np.array([9.0, 11.0, 4.0, np.nan, 2.0, 50.0])  # means: 10, 4, 2


def log(latency_s: np.ndarray | None = TIMES) -> Log:
    return Log(CHOSEN, np.array([1.0, 1, 1, 0, 0, 1]), np.full(6, 1 / 3), np.arange(6), latency_s)


def test_each_targets_mean_time_is_a_limit() -> None:
    points = latency_frontier(log(), P, COST, 0.0, 50)
    assert [point.max_latency_s for point in points] == [None, 4.0, 2.0]
    assert [point.value.policy for point in points] == ["no limit", "at most 4 s", "at most 2 s"]
    assert [point.value.model for point in points] == pytest.approx([0.9, 0.6, 0.5])
    assert [point.cost_usd for point in points] == [3.0, 2.0, 1.0]
    assert [point.latency_s for point in points] == [10.0, 4.0, 2.0]
    assert points[1].value.snips.value == 0.5  # of the rewards of the second target, 1 and 0


def test_a_target_of_unknown_time_is_permitted() -> None:
    times = np.where(CHOSEN == 0, np.nan, TIMES)
    points = latency_frontier(log(times), P, COST, 0.0, 50)
    assert [point.max_latency_s for point in points] == [None, 2.0]
    assert [point.cost_usd for point in points] == [3.0, 3.0]
    assert np.isnan(points[1].latency_s)


@pytest.mark.parametrize("times", [None, np.full(6, np.nan), np.where(CHOSEN == 0, TIMES, np.nan)])
def test_without_times_to_compare_there_is_no_frontier(times: np.ndarray | None) -> None:
    assert latency_frontier(log(times), P, COST, 0.0, 50) == []


def test_times_of_targets_outside_the_pool_do_not_count() -> None:
    assert target_latency_s(log(), 3).tolist() == [10.0, 4.0, 2.0]
