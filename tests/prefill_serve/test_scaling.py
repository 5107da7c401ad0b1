from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from prefill_serve.scaling import WORK_S, ByWork
from prefill_serve.scheduler import BatchScheduler


def replicas_wanted(metrics: dict[str, Any] | None) -> float:
    return ByWork(target_work_s=0.5)(SimpleNamespace(aggregated_metrics=metrics))[0]


def test_there_are_as_many_replicas_as_the_work_of_all_takes() -> None:
    assert replicas_wanted({WORK_S: {"a": 1.5, "b": 0.5}}) == 4.0
    assert replicas_wanted({WORK_S: {"a": 0.0}}) == 0.0


def test_before_any_replica_has_told_its_work_there_is_none() -> None:
    assert replicas_wanted(None) == replicas_wanted({}) == 0.0


def test_work_is_what_waits_and_what_has_begun_at_the_speed_so_far() -> None:
    async def scenario() -> tuple[float, float, float]:
        lanes: BatchScheduler[int, int] = BatchScheduler(lambda batch: batch.items, num_lanes=1, budget_tokens=100)
        await lanes.submit(1, num_tokens=100)
        speed = lanes.tokens_per_s
        waiting = [asyncio.create_task(lanes.submit(i, num_tokens=100)) for i in range(3)]
        await asyncio.sleep(0)
        work_s = lanes.work_s
        await asyncio.gather(*waiting)
        lanes.close()
        return speed, work_s, lanes.work_s

    speed, work_s, after_s = asyncio.run(scenario())
    assert work_s == 300 / speed
    assert after_s == 0.0
