"""Lanes: a scheduler that groups single requests into batches, each on a core of its own.

On a CPU a single prompt finishes soonest on all cores, and many prompts finish soonest on one core each. So a prompt
that arrives alone gets all cores, and a queue is divided among one-core threads. No request waits for a batch to fill.
A device that needs large batches has a single lane.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Generic, TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")

_DECAY = 0.95  # decay of the measured rate, per batch
# Lanes need the interpreter lock between matrix products and wait this long for it while a request is parsed. With
# Python's default of 5 ms, two lanes lost 4 % of their cores.
_SWITCH_S = 3e-4


class Overloaded(Exception):  # noqa: N818 - a refusal, not a fault
    """The request would wait in the queue for longer than its limit."""

    def __init__(self, wait_s: float, max_wait_s: float) -> None:
        """`max_wait_s` is the item's limit, `wait_s` its expected wait."""
        self.max_wait_s, self.retry_after_s = max_wait_s, max(wait_s - max_wait_s, 1.0)
        super().__init__(f"the endpoint is busy: try again in {math.ceil(self.retry_after_s)} s")


@dataclass
class _Waiting(Generic[In, Out]):
    item: In
    num_tokens: int
    done: asyncio.Future[Out]
    since: float = field(default_factory=perf_counter)


@dataclass(frozen=True)
class Batch(Generic[In]):
    """Items that run together, and how long each was queued."""

    items: list[In]
    num_tokens: int
    queued_s: list[float]


class BatchScheduler(Generic[In, Out]):
    """Runs `work` on batches in threads; it returns one result per item. `submit` runs on the loop."""

    def __init__(
        self, work: Callable[[Batch[In]], Sequence[Out]], num_lanes: int, budget_tokens: int, num_threads: int = 1
    ) -> None:
        """`num_threads` is the number of cores for a prompt that runs alone."""
        self.work, self.num_lanes, self.budget_tokens = work, num_lanes, budget_tokens
        self.queued_tokens = 0
        self._done_tokens, self._lane_seconds = 0.0, 0.0
        self._queue: deque[_Waiting[In, Out]] = deque()
        self._num_free, self._running_tokens = num_lanes, 0
        self._running: set[asyncio.Future[None]] = set()
        self._wide = _threads(1, num_threads)
        self._narrow = _threads(num_lanes, 1) if num_lanes > 1 else self._wide
        # Only one thread may have an OpenMP team. With two teams and more threads than cores, OpenMP would put threads
        # to sleep between matrix products, and a prompt would take twice as long.
        self._wide.submit(torch.get_num_threads).result()
        torch.set_num_threads(1)
        sys.setswitchinterval(_SWITCH_S)

    @property
    def tokens_per_s(self) -> float:
        """Recent rate of all lanes together; infinite before the first batch."""
        return self._done_tokens / self._lane_seconds * self.num_lanes if self._lane_seconds else math.inf

    @property
    def work_s(self) -> float:
        """Seconds until all queued and running work is done."""
        return (self.queued_tokens + self._running_tokens) / self.tokens_per_s

    @property
    def expected_wait_s(self) -> float:
        """Seconds that an item submitted now would be queued."""
        ahead = self.queued_tokens + self._running_tokens if self._num_free == 0 else self.queued_tokens
        return ahead / self.tokens_per_s

    def admit(self, max_wait_s: float) -> None:
        """Raises Overloaded if an item submitted now would wait longer."""
        wait_s = self.expected_wait_s
        if wait_s > max_wait_s:
            raise Overloaded(wait_s, max_wait_s)

    async def submit(self, item: In, num_tokens: int, max_wait_s: float = math.inf) -> Out:
        """Returns the result for an item. Raises Overloaded if it would wait longer, and whatever `work` raises."""
        self.admit(max_wait_s)
        waiting: _Waiting[In, Out] = _Waiting(item, num_tokens, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self.queued_tokens += num_tokens
        self._dispatch()
        return await waiting.done

    def close(self) -> None:
        """Stops the threads after the submitted work."""
        self._narrow.shutdown(wait=False)
        self._wide.shutdown(wait=False)

    def _dispatch(self) -> None:
        share = min(self.budget_tokens, math.ceil(self.queued_tokens / self.num_lanes))
        while self._queue and self._num_free:
            is_alone = len(self._queue) == 1 and self._num_free == self.num_lanes
            taken = self._take(share)
            if taken:
                num_lanes = self.num_lanes if is_alone else 1
                self._num_free -= num_lanes
                self._running_tokens += sum(waiting.num_tokens for waiting in taken)
                self._running.add(task := asyncio.ensure_future(self._run(taken, num_lanes)))
                task.add_done_callback(self._running.discard)

    def _take(self, share: int) -> list[_Waiting[In, Out]]:
        """Takes items from the queue up to `share` tokens, and drops those whose callers have gone."""
        taken: list[_Waiting[In, Out]] = []
        num_tokens = 0
        while self._queue and (not taken or num_tokens + self._queue[0].num_tokens <= share):
            waiting = self._queue.popleft()
            self.queued_tokens -= waiting.num_tokens
            if not waiting.done.done():
                taken.append(waiting)
                num_tokens += waiting.num_tokens
        return taken

    async def _run(self, taken: list[_Waiting[In, Out]], num_lanes: int) -> None:
        num_tokens = sum(waiting.num_tokens for waiting in taken)
        started = perf_counter()
        batch = Batch([w.item for w in taken], num_tokens, [started - w.since for w in taken])
        try:
            threads = self._wide if num_lanes == self.num_lanes else self._narrow
            results = await asyncio.get_running_loop().run_in_executor(threads, self.work, batch)
            self._done_tokens = _DECAY * self._done_tokens + num_tokens
            self._lane_seconds = _DECAY * self._lane_seconds + num_lanes * (perf_counter() - started)
            answers = [partial(w.done.set_result, result) for w, result in zip(taken, results, strict=True)]
        except Exception as error:
            answers = [partial(w.done.set_exception, error) for w in taken]
        self._num_free += num_lanes
        self._running_tokens -= num_tokens
        self._dispatch()  # first, so that no lane idles while answers are delivered
        for waiting, answer in zip(taken, answers, strict=True):
            if not waiting.done.done():
                answer()


def _threads(count: int, cores: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "lane", initializer=torch.set_num_threads, initargs=(cores,))
