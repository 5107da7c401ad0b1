"""The actor of `collect`: calls of a shard out, their answers kept; and the task that grades them."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import pyarrow as pa
import ray

from prefill_router import shards, storage
from prefill_router.collection.answers import ShardPlace, load_states, write_states
from prefill_router.collection.calls import Answer, Asked, Call, Spent, call_key
from prefill_router.collection.client import Miss, ask, backoff_s, http_client
from prefill_router.collection.journal import CallState, Journal
from prefill_router.collection.limits import Limits
from prefill_router.collection.purse import Allowance, Purse
from prefill_router.corpus import Row
from prefill_router.errors import UserError
from prefill_router.graders import Grader
from prefill_router.plan import Shard, read_shard
from prefill_router.pool import Pool, Target
from prefill_router.schema import CORRECT, OUTCOMES, OUTPUT_TOKENS, PROMPT, PROMPT_ID, TARGET
from prefill_router.shards import ShardFile

# What graders read of a row where their options name no other column.
ROW_COLUMNS = ("reference", "choices", "tests", "entry_point", "setup", "metadata", "schema")


@dataclass(frozen=True)
class AskTask:
    """The prompts of a shard that are to be asked, by their places in it, and the calls that are answered elsewhere."""

    shard: Shard
    rows: tuple[int, ...]
    elsewhere: frozenset[str]


@dataclass(frozen=True)
class AskedShard:
    """What came of a shard's calls in this run."""

    answered: int = 0
    failed: int = 0
    left_out: int = 0  # for want of budget
    attempts: int = 0


@ray.remote(num_cpus=0)
class PurseActor(Purse):
    """The budget of all workers."""


class AskShard:
    """Calls overlap, of several shards at once: one event loop makes them all."""

    def __init__(
        self, pool: Pool, asked: Asked, out: str, attempts: int, num_workers: int, max_prompt_bytes: int, purse: Any
    ) -> None:
        self.pool, self.asked, self.out, self.attempts = pool, asked, out, attempts
        self.max_prompt_bytes, self.purse = max_prompt_bytes, purse
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._limits = {target.name: Limits(target, num_workers) for target in pool.targets}
        self._allowance = Allowance(self._draw, self._give_back)
        self._rng = random.Random()

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        return http_client()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task: AskTask = pickle.loads(row["task"])
        for target in self.pool.targets:
            _check_key(target)
        done = asyncio.run_coroutine_threadsafe(self._ask_shard(task), self._loop).result()
        return {"done": pickle.dumps(done)}

    async def _ask_shard(self, task: AskTask) -> AskedShard:
        rows = await asyncio.to_thread(read_shard, task.shard, self.max_prompt_bytes)
        place = ShardPlace(self.out, task.shard.digest)
        states = await asyncio.to_thread(load_states, place)
        wanted = [
            call
            for i in task.rows
            for target in self.pool.targets
            if (call := Call(rows[i].prompt_id, rows[i].prompt, target, self.asked)).key not in task.elsewhere
            and (states.get(call.key) is None or states[call.key].answer is None)
        ]
        if not wanted:
            return AskedShard()
        journal = Journal(place.journal)
        tried = await asyncio.gather(*(self._ask(call, journal) for call in wanted))
        await self._allowance.give_back()
        states = await asyncio.to_thread(load_states, place)
        await asyncio.to_thread(write_states, place, states)
        answered = sum(call.key in states and states[call.key].answer is not None for call in wanted)
        left_out = sum(count == 0 for count in tried)
        return AskedShard(answered, len(wanted) - answered - left_out, left_out, sum(tried))

    async def _ask(self, call: Call, journal: Journal) -> int:
        """Asks until there is an answer, or no use in asking; returns how many attempts were made."""
        limits = self._limits[call.target.name]
        for attempt in range(1, self.attempts + 1):
            async with limits.place(call.worst.tokens):
                if not await self._allowance.reserve(call.worst):
                    return attempt - 1
                found = await self._attempt(call, journal)
            if isinstance(found, Answer) or found.is_final or attempt == self.attempts:
                return attempt
            wait_s = backoff_s(attempt, found, self._rng)
            if found.retry_after_s is not None:
                limits.hold(wait_s)  # for all of the target's calls
            await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt returns")

    async def _attempt(self, call: Call, journal: Journal) -> Answer | Miss:
        """One attempt, of which both ends are noted."""
        name = await journal.begin(call)
        found = await ask(call, self._http)
        if isinstance(found, Answer):
            spent, lost = found.spent(call), Spent()
            await journal.end(name, found, spent, lost, None)
        else:
            spent, lost = Spent(), call.worst if found.may_be_paid else Spent()
            await journal.end(name, None, spent, lost, found.reason)
        await self._allowance.settle(call.worst, spent + lost)
        return found

    async def _draw(self, wanted: Spent) -> Spent:
        return await self.purse.draw.remote(wanted)  # type: ignore[no-any-return]

    async def _give_back(self, part: Spent) -> None:
        await self.purse.give_back.remote(part)


def _check_key(target: Target) -> None:
    """Raises UserError where this process has no key for a target."""
    name = target.upstream.key_env if target.upstream is not None else None
    if name is not None and not os.environ.get(name):
        raise UserError(f'target "{target.name}": the environment of the workers has no {name}, which holds its key')


@dataclass(frozen=True)
class GradeTask:
    shard: Shard
    sources: tuple[str, ...]  # the names of shards that hold answers to its prompts


def grade_shard(
    item: dict[str, Any],
    out: str,
    targets: tuple[Target, ...],
    asked: Asked,
    grader: Grader | None,
    columns: tuple[str, ...],
    max_prompt_bytes: int,
) -> dict[str, Any]:
    """Writes the outcomes of a shard, of every answer that there is to its prompts."""
    task: GradeTask = pickle.loads(item["task"])
    rows = read_shard(task.shard, max_prompt_bytes, columns)
    states: dict[str, CallState] = {}
    for name in task.sources:
        states |= load_states(ShardPlace(out, name))
    outcomes, num_graded = [], 0
    for row in rows:
        for target in targets:
            state = states.get(call_key(row.content_digest.hex(), target.name, asked))
            if state is None or state.answer is None:
                continue
            score = _grade(grader, state.answer, row, columns)
            num_graded += score is not None
            outcomes.append(
                {
                    PROMPT_ID: row.prompt_id,
                    TARGET: target.name,
                    CORRECT: score,
                    OUTPUT_TOKENS: state.answer.output_tokens,
                }
            )
    written: ShardFile | None = None
    if outcomes:
        table = pa.Table.from_pylist(outcomes, schema=OUTCOMES)
        written = shards.write_named(storage.join(out, "outcomes"), f"part-{task.shard.digest}.parquet", table)
    return {"file": pickle.dumps(written), "outcomes": len(outcomes), "graded": num_graded}


def _grade(grader: Grader | None, answer: Answer, row: Row, columns: tuple[str, ...]) -> float | None:
    if grader is None:
        return None
    fields: Mapping[str, Any] = dict(zip(columns, row.extras, strict=True))
    known = {name: value for name, value in fields.items() if value is not None}
    return grader(answer.text, {PROMPT_ID: row.prompt_id, PROMPT: row.prompt, **known}).score
