"""Lanes whose work blocks until a test releases it, to observe decisions meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from prefill_serve.scheduler import Batch, BatchScheduler, Overloaded


class Held:
    """Work that blocks until released, and records its batches and its thread's core count."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.cores: list[int] = []
        self.may_go = threading.Event()

    def __call__(self, batch: Batch[int]) -> list[int]:
        self.batches.append(list(batch.items))
        self.cores.append(torch.get_num_threads())
        assert self.may_go.wait(20)
        return [item * 10 for item in batch.items]


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_a_prompt_that_comes_alone_has_all_cores_and_a_queue_is_shared_out() -> None:
    work = Held()

    async def scenario() -> None:
        lanes: BatchScheduler[int, int] = BatchScheduler(work, 2, 100, 2)
        alone = asyncio.create_task(lanes.submit(1, 10))
        await settle()
        others = [asyncio.create_task(lanes.submit(item, 10)) for item in (2, 3, 4, 5)]
        await settle()
        assert work.batches == [[1]]
        work.may_go.set()
        assert await alone == 10
        assert await asyncio.gather(*others) == [20, 30, 40, 50]

    run(scenario)
    assert sorted(work.batches[1:]) == [[2, 3], [4, 5]]
    assert work.cores == [2, 1, 1]


def test_a_batch_holds_its_budget_and_a_longer_prompt_is_a_batch_of_its_own() -> None:
    work = Held()

    async def scenario() -> None:
        lanes: BatchScheduler[int, int] = BatchScheduler(work, 1, 100)
        first = asyncio.create_task(lanes.submit(0, 10))
        await settle()
        rest = [asyncio.create_task(lanes.submit(i, n)) for i, n in [(1, 60), (2, 40), (3, 500), (4, 1), (5, 1)]]
        await settle()
        assert lanes.queued_tokens == 602
        work.may_go.set()
        await asyncio.gather(first, *rest)
        assert lanes.queued_tokens == 0

    run(scenario)
    assert work.batches == [[0], [1, 2], [3], [4, 5]]


def test_more_than_the_wait_allows_is_refused_and_the_refusal_says_for_how_long() -> None:
    def slow(batch: Batch[int]) -> list[int]:
        time.sleep(batch.num_tokens / 1000)
        return list(batch.items)

    async def scenario() -> None:
        lanes: BatchScheduler[int, int] = BatchScheduler(slow, 1, 100)
        await lanes.submit(0, 100)  # sets the rate: 1,000 tokens a second, or fewer on a busy machine
        rate = lanes.tokens_per_s
        patience_s = 500 / rate
        accepted = [asyncio.create_task(lanes.submit(i, 100, patience_s)) for i in range(4)]
        await asyncio.sleep(0)
        late = [asyncio.create_task(lanes.submit(i, 5000, patience_s)) for i in (4, 5)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await lanes.submit(6, 1, patience_s)
        assert refused.value.retry_after_s == pytest.approx(4900 / rate, rel=0.1)
        for task in late:
            task.cancel()
        assert await asyncio.gather(*accepted) == [0, 1, 2, 3]

    run(scenario)


def test_what_nobody_waits_for_any_more_is_not_done() -> None:
    work = Held()

    async def scenario() -> None:
        lanes: BatchScheduler[int, int] = BatchScheduler(work, 1, 1)
        tasks = [asyncio.create_task(lanes.submit(i, 1)) for i in range(3)]
        await settle()
        tasks[1].cancel()
        await settle()
        work.may_go.set()
        assert await tasks[0] == 0
        assert await tasks[2] == 20

    run(scenario)
    assert work.batches == [[0], [2]]


def test_a_batch_that_fails_fails_alone() -> None:
    def fragile(batch: Batch[int]) -> list[int]:
        if 1 in batch.items:
            raise RuntimeError("broken")
        return list(batch.items)

    async def scenario() -> None:
        lanes: BatchScheduler[int, int] = BatchScheduler(fragile, 2, 1)
        results = await asyncio.gather(*(lanes.submit(i, 1) for i in range(4)), return_exceptions=True)
        assert [str(result) for result in results] == ["0", "broken", "2", "3"]
        assert await lanes.submit(7, 1) == 7

    run(scenario)
