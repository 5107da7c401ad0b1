"""The actor of `collect`: makes the calls of a shard and writes their answers."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import httpx

from prefill_jobs.runtime.job_metrics import CollectMetrics
from prefill_jobs.runtime.shared_objects import Shared
from prefill_router.collection.answers import ShardPlace, load_states, write_states
from prefill_router.collection.journal import Journal
from prefill_router.collection.rate_limits import RateLimits
from prefill_router.collection.shared_budget import Allowance
from prefill_router.collection.target_calls import Asked, Spent, TargetAnswer, TargetCall
from prefill_router.collection.target_client import Miss, ask, backoff_s
from prefill_router.common.errors import UserError
from prefill_router.corpus.plan import Shard, read_shard
from prefill_router.policy.pool import Pool, Target
from prefill_router.upstreams.transport import http_client

_LEFT_OUT = Miss("not made: the budget is used up")

T = TypeVar("T")


@dataclass(frozen=True)
class AskTask:
    """Prompts of a shard to send to every target, except for calls that another shard has an answer to."""

    shard: Shard
    rows: tuple[int, ...]  # indices in the shard
    elsewhere: frozenset[str]  # keys of calls answered in other shards


@dataclass(frozen=True)
class CallCounts:
    """Counts of a shard's calls in this run."""

    answered: int = 0
    failed: int = 0
    left_out: int = 0  # calls that the budget did not allow
    reasons: Mapping[str, int] = field(default_factory=dict)  # counts of failed calls by "TARGET: REASON"


class CallActor(ABC, Generic[T]):
    """Makes the calls of several tasks concurrently, in one event loop."""

    def __init__(
        self, pool: Pool, asked: Asked, out: str, attempts: int, num_workers: int, max_prompt_bytes: int, budget: Shared
    ) -> None:
        self.pool, self.asked, self.out, self.attempts = pool, asked, out, attempts
        self.max_prompt_bytes, self.budget = max_prompt_bytes, budget
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._limits = {target.name: RateLimits(target, num_workers) for target in pool.targets}
        self._allowance = Allowance(self._draw, self._give_back)
        self._rng = random.Random()
        self._metrics = CollectMetrics()

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        return http_client()

    @abstractmethod
    def calls(self, task: T) -> tuple[list[TargetCall], ShardPlace]:
        """The calls of a task, and the place of the shard for their answers."""

    def __call__(self, task: T) -> CallCounts:
        for target in self.pool.targets:
            _check_key(target)
        return self._start(task)

    def _start(self, task: T) -> CallCounts:
        return asyncio.run_coroutine_threadsafe(self._make(task), self._loop).result()

    async def _make(self, task: T) -> CallCounts:
        """Makes the calls that have no answer yet."""
        calls, place = await asyncio.to_thread(self.calls, task)
        states = await asyncio.to_thread(load_states, place)
        wanted = [call for call in calls if call.key not in states or states[call.key].answer is None]
        if not wanted:
            return CallCounts()
        journal = Journal(place.journal)
        tried = await asyncio.gather(*(self._ask(call, journal) for call in wanted))
        await self._allowance.give_back()
        states = await asyncio.to_thread(load_states, place)
        await asyncio.to_thread(write_states, place, states)
        misses = [(call.target.name, miss) for call, miss in zip(wanted, tried, strict=True) if miss is not None]
        reasons = Counter(f"{name}: {miss.reason}" for name, miss in misses if miss is not _LEFT_OUT)
        num_failed = reasons.total()
        return CallCounts(len(wanted) - len(misses), num_failed, len(misses) - num_failed, reasons)

    async def _ask(self, call: TargetCall, journal: Journal) -> Miss | None:
        """Retries a call until it is answered or cannot succeed. Returns None, or the last failure."""
        limits, miss = self._limits[call.target.name], _LEFT_OUT
        for attempt in range(self.attempts):
            if attempt > 0:
                wait_s = backoff_s(attempt, miss, self._rng)
                if miss.retry_after_s:
                    limits.hold(wait_s)  # pauses all calls to the target
                await asyncio.sleep(wait_s)
            async with limits.place(call.worst.tokens):
                if not await self._allowance.reserve(call.worst):
                    break
                found = await self._attempt(call, journal)
            if isinstance(found, TargetAnswer):
                return None
            miss = found
            if miss.is_final:
                break
        return miss

    async def _attempt(self, call: TargetCall, journal: Journal) -> TargetAnswer | Miss:
        """Makes one attempt, and records its start and its end in the journal."""
        name = await journal.begin(call)
        found = await ask(call, self._http)
        if isinstance(found, TargetAnswer):
            spent, lost = found.spent(call), Spent()
            await journal.end(name, found, spent, lost, None)
        else:
            spent, lost = Spent(), call.worst if found.may_be_paid else Spent()
            await journal.end(name, None, spent, lost, found.reason)
        self._metrics.attempt(call.target.name, (spent + lost).usd, is_answered=isinstance(found, TargetAnswer))
        await self._allowance.settle(call.worst, spent + lost)
        return found

    async def _draw(self, wanted: Spent) -> Spent:
        return await self.budget.call_async("draw", wanted)  # type: ignore[no-any-return]

    async def _give_back(self, part: Spent) -> None:
        await self.budget.call_async("give_back", part)


class ShardCaller(CallActor[AskTask]):
    """Sends the prompts of a shard to the targets."""

    def calls(self, task: AskTask) -> tuple[list[TargetCall], ShardPlace]:
        rows = read_shard(task.shard, self.max_prompt_bytes)
        calls = (
            TargetCall(rows[i].prompt_id, rows[i].prompt, target, self.asked)
            for i in task.rows
            for target in self.pool.targets
        )
        place = ShardPlace(self.out, task.shard.digest)
        return [call for call in calls if call.key not in task.elsewhere], place


def _check_key(target: Target) -> None:
    """Raises UserError if the API key of a target is not in this process's environment."""
    name = target.upstream.key_env if target.upstream is not None else None
    if name is not None and not os.environ.get(name):
        raise UserError(f'target "{target.name}": {name} is not set on the workers: set it to the target\'s API key')
