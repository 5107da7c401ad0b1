"""From answers to outcomes: the task that grades a shard, and the actor that asks a judge about its answers.

A judge's replies are answers too, made within the budget and kept: a grader is asked twice, once to hear what it would
ask, and once with the replies at hand.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from prefill_jobs.collect.collector import AskedShard, AskShard
from prefill_router import storage
from prefill_router.collection.answers import ShardPlace, load_states
from prefill_router.collection.journal import CallState
from prefill_router.collection.target_calls import Asked, TargetAnswer, TargetCall, call_key
from prefill_router.common.schema import CORRECT, OUTCOMES, OUTPUT_TOKENS, PROMPT, PROMPT_ID, TARGET
from prefill_router.corpus.plan import Shard, read_shard
from prefill_router.corpus.reader import BadRow, Message, Row
from prefill_router.graders import BoundedGrader, Grader, Reply
from prefill_router.policy.pool import Target
from prefill_router.storage import parquet_objects
from prefill_router.storage.parquet_objects import ShardFile

# What graders read of a row where their options name no other column.
ROW_COLUMNS = ("reference", "choices", "tests", "entry_point", "setup", "metadata", "schema")

JUDGE_ASKED = Asked(max_output_tokens=512, temperature=0.0)


@dataclass(frozen=True)
class GradeTask:
    shard: Shard
    sources: tuple[str, ...]  # the names of shards that hold answers to its prompts


@dataclass(frozen=True)
class Grading:
    """What is the same for all shards."""

    out: str
    targets: tuple[Target, ...]
    asked: Asked
    grader: Grader | BoundedGrader | None
    columns: tuple[str, ...]
    max_prompt_bytes: int
    judge: Target | None = None
    answered: Mapping[str, str] = field(default_factory=dict)  # shards by the calls to the judge that they answer

    def answers(self, task: GradeTask) -> Iterator[tuple[Row, Target, TargetAnswer]]:
        """Every answer that there is to a shard's prompts."""
        rows = read_shard(task.shard, self.max_prompt_bytes, self.columns)
        states = _states(self.out, task.sources)
        for row in rows:
            for target in self.targets:
                state = states.get(call_key(row.content_digest.hex(), target.name, self.asked))
                if state is not None and state.answer is not None:
                    yield row, target, state.answer

    def score(self, answer: TargetAnswer, row: Row, ask: Any = None) -> float | None:
        if self.grader is None:
            return None
        grader = self.grader
        if isinstance(grader, Grader) and ask is not None:
            grader = replace(grader, options={**grader.options, "ask": ask})
        return grader(answer.text, self._fields(row)).score

    def unfit(self, shard: Shard) -> list[BadRow | None]:
        """For each of a shard's rows, in their order, why no answer to it can be graded; None where one can."""
        rows = read_shard(shard, self.max_prompt_bytes, self.columns)
        reasons = [None if self.grader is None else self.grader.unfit(self._fields(row)) for row in rows]
        return [
            None if reason is None else BadRow(*place, row.prompt_id, reason)
            for row, place, reason in zip(rows, shard.places, reasons, strict=True)
        ]

    def _fields(self, row: Row) -> dict[str, Any]:
        """What graders see of a row."""
        known = {name: value for name, value in zip(self.columns, row.extras, strict=True) if value is not None}
        return {PROMPT_ID: row.prompt_id, PROMPT: row.prompt, **known}

    def judge_calls(self, task: GradeTask) -> list[TargetCall]:
        """What the grader would ask the judge about a shard's answers."""
        if self.judge is None:
            return []
        calls: dict[str, TargetCall] = {}
        for row, _, answer in self.answers(task):
            heard: list[list[Message]] = []
            self.score(answer, row, _Heard(heard))
            for messages in heard:
                call = TargetCall(row.prompt_id, messages, self.judge, JUDGE_ASKED)
                calls[call.key] = call
        return list(calls.values())


def unasked(_messages: Sequence[Message]) -> Reply:
    """Stands for a judge until there is one."""
    raise LookupError("no judge was asked")


class JudgeShard(AskShard):
    """Asks the judge what a shard's grader wants to know. Its pool is the judge alone."""

    def __init__(self, grading: Grading, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.grading = grading

    def _start(self, pickled: bytes) -> AskedShard:
        task: GradeTask = pickle.loads(pickled)
        calls = [call for call in self.grading.judge_calls(task) if call.key not in self.grading.answered]
        name = hashlib.sha256(f"judge\n{task.shard.digest}".encode()).hexdigest()[:32]
        making = self._make(calls, ShardPlace(self.out, name))
        return asyncio.run_coroutine_threadsafe(making, self._loop).result()


def grade_shard(item: dict[str, Any], grading: Grading) -> dict[str, Any]:
    """Writes the outcomes of a shard, of every answer that there is to its prompts."""
    task: GradeTask = pickle.loads(item["task"])
    names = {grading.answered[call.key] for call in grading.judge_calls(task) if call.key in grading.answered}
    ask = None if grading.judge is None else _Recalled(grading, _states(grading.out, sorted(names)))
    outcomes = [
        {
            PROMPT_ID: row.prompt_id,
            TARGET: target.name,
            CORRECT: grading.score(answer, row, ask),
            OUTPUT_TOKENS: answer.output_tokens,
        }
        for row, target, answer in grading.answers(task)
    ]
    written: ShardFile | None = None
    if outcomes:
        table = pa.Table.from_pylist(outcomes, schema=OUTCOMES)
        written = parquet_objects.write_named(
            storage.join(grading.out, "outcomes"), f"part-{task.shard.digest}.parquet", table
        )
    graded = sum(outcome[CORRECT] is not None for outcome in outcomes)
    return {"file": pickle.dumps(written), "outcomes": len(outcomes), "graded": graded}


@dataclass(frozen=True)
class _Heard:
    """A judge that only listens."""

    messages: list[list[Message]]

    def __call__(self, messages: Sequence[Message]) -> Reply:
        self.messages.append(list(messages))
        return Reply("")


@dataclass(frozen=True)
class _Recalled:
    """A judge that says what it has said before."""

    grading: Grading
    states: Mapping[str, CallState]

    def __call__(self, messages: Sequence[Message]) -> Reply:
        assert self.grading.judge is not None
        call = TargetCall("", list(messages), self.grading.judge, JUDGE_ASKED)
        state = self.states.get(call.key)
        if state is None or state.answer is None:
            raise LookupError("the judge gave no answer")
        return Reply(state.answer.text, state.spent.usd)


def _states(out: str, names: Sequence[str]) -> dict[str, CallState]:
    states: dict[str, CallState] = {}
    for name in names:
        states |= load_states(ShardPlace(out, name))
    return states
