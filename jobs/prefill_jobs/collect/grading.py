"""Grades answers: the task that writes the outcomes of a shard, and the actor that calls a judge about its answers.

Calls to a judge are kept and count towards the budget like any other. A grader therefore runs twice: first to record
what it would ask the judge, then with the judge's replies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyarrow as pa

from prefill_jobs.collect.collector import CallActor
from prefill_router import storage
from prefill_router.collection.answers import ShardPlace, load_states
from prefill_router.collection.journal import CallState
from prefill_router.collection.target_calls import Asked, Spent, TargetAnswer, TargetCall, call_key
from prefill_router.common.schema import CORRECT, COST_USD, OUTCOMES, OUTPUT_TOKENS, PROMPT, PROMPT_ID, TARGET
from prefill_router.corpus.plan import Shard, read_shard
from prefill_router.corpus.reader import BadRow, Message, Row
from prefill_router.graders import BoundedGrader, Grader, Reply
from prefill_router.policy.pool import Target
from prefill_router.storage import parquet_objects
from prefill_router.storage.parquet_objects import ShardFile

# Columns that graders read by default.
ROW_COLUMNS = ("reference", "choices", "tests", "entry_point", "setup", "metadata", "schema")

JUDGE_ASKED = Asked(max_output_tokens=512, temperature=0.0)


@dataclass(frozen=True)
class GradeTask:
    shard: Shard
    sources: tuple[str, ...]  # names of the shards with answers to its prompts


class RowCheck(NamedTuple):
    """The reason why a row cannot be graded, if there is one, and its stratum."""

    bad: BadRow | None = None
    stratum: Any = None


@dataclass(frozen=True)
class Grading:
    """Inputs that all shards share."""

    out: str
    targets: tuple[Target, ...]
    asked: Asked
    grader: Grader | BoundedGrader | None
    columns: tuple[str, ...]
    max_prompt_bytes: int
    judge: Target | None = None
    answered: Mapping[str, str] = field(default_factory=dict)  # shard with the reply, by call to the judge

    def answers(self, task: GradeTask) -> Iterator[tuple[Row, Target, TargetAnswer, Spent]]:
        """Yields every answer to a shard's prompts, and what was spent on it."""
        rows = read_shard(task.shard, self.max_prompt_bytes, self.columns)
        states = _states(self.out, task.sources)
        for row in rows:
            for target in self.targets:
                state = states.get(call_key(row.content_digest.hex(), target.name, self.asked))
                if state is not None and state.answer is not None:
                    yield row, target, state.answer, state.spent

    def score(self, answer: TargetAnswer, row: Row, ask: Any = None) -> float | None:
        if self.grader is None:
            return None
        grader = self.grader
        if isinstance(grader, Grader) and ask is not None:
            grader = replace(grader, options={**grader.options, "ask": ask})
        return grader(answer.text, self._fields(row)).score

    def check(self, shard: Shard, stratum: str | None = None) -> list[RowCheck]:
        """Checks each row of a shard, and reads its column `stratum`."""
        columns = tuple(dict.fromkeys([*self.columns, *([] if stratum is None else [stratum])]))
        rows = read_shard(shard, self.max_prompt_bytes, columns)
        checks = []
        for row, place in zip(rows, shard.places, strict=True):
            reason = None if self.grader is None else self.grader.unfit(self._fields(row))
            bad = None if reason is None else BadRow(*place, row.prompt_id, reason)
            checks.append(RowCheck(bad, None if stratum is None else row.extras[columns.index(stratum)]))
        return checks

    def _fields(self, row: Row) -> dict[str, Any]:
        """The fields of a row that graders see. The row may have further columns."""
        known = {name: value for name, value in zip(self.columns, row.extras, strict=False) if value is not None}
        return {PROMPT_ID: row.prompt_id, PROMPT: row.prompt, **known}

    def judge_calls(self, task: GradeTask) -> list[TargetCall]:
        """The calls to the judge that grading a shard's answers requires."""
        if self.judge is None:
            return []
        calls: dict[str, TargetCall] = {}
        for row, _, answer, _ in self.answers(task):
            heard: list[list[Message]] = []
            self.score(answer, row, _RecordingJudge(heard))
            for messages in heard:
                call = TargetCall(row.prompt_id, messages, self.judge, JUDGE_ASKED)
                calls[call.key] = call
        return list(calls.values())


def unasked(_messages: Sequence[Message]) -> Reply:
    """Placeholder for a judge that must not be called yet."""
    raise LookupError("no judge was asked")


class ShardJudge(CallActor[GradeTask]):
    """Calls the judge about a shard's answers. The judge is the only target of its pool."""

    def __init__(self, grading: Grading, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.grading = grading

    def calls(self, task: GradeTask) -> tuple[list[TargetCall], ShardPlace]:
        calls = [call for call in self.grading.judge_calls(task) if call.key not in self.grading.answered]
        name = hashlib.sha256(f"judge\n{task.shard.digest}".encode()).hexdigest()[:32]
        return calls, ShardPlace(self.out, name)


class GradedShard(NamedTuple):
    """The outcomes of a shard, and counts of them."""

    file: ShardFile | None  # None without outcomes
    outcomes: int
    graded: int


def grade_shard(task: GradeTask, grading: Grading) -> GradedShard:
    """Writes the outcomes of every answer to a shard's prompts."""
    names = {grading.answered[call.key] for call in grading.judge_calls(task) if call.key in grading.answered}
    ask = None if grading.judge is None else _ReplayingJudge(grading, _states(grading.out, sorted(names)))
    outcomes = [
        {
            PROMPT_ID: row.prompt_id,
            TARGET: target.name,
            CORRECT: grading.score(answer, row, ask),
            OUTPUT_TOKENS: answer.output_tokens,
            COST_USD: spent.usd if answer.is_counted else None,
        }
        for row, target, answer, spent in grading.answers(task)
    ]
    written: ShardFile | None = None
    if outcomes:
        table = pa.Table.from_pylist(outcomes, schema=OUTCOMES)
        written = parquet_objects.write_named(
            storage.join(grading.out, "outcomes"), f"part-{task.shard.digest}.parquet", table
        )
    graded = sum(outcome[CORRECT] is not None for outcome in outcomes)
    return GradedShard(written, len(outcomes), graded)


@dataclass(frozen=True)
class _RecordingJudge:
    """A judge that records the messages it is asked and replies with an empty text."""

    messages: list[list[Message]]

    def __call__(self, messages: Sequence[Message]) -> Reply:
        self.messages.append(list(messages))
        return Reply("")


@dataclass(frozen=True)
class _ReplayingJudge:
    """A judge that returns its kept replies."""

    grading: Grading
    states: Mapping[str, CallState]

    def __call__(self, messages: Sequence[Message]) -> Reply:
        assert self.grading.judge is not None
        call = TargetCall("", list(messages), self.grading.judge, JUDGE_ASKED)
        state = self.states.get(call.key)
        if state is None or state.answer is None:
            raise LookupError("the judge did not answer")
        return Reply(state.answer.text, state.spent.usd)


def _states(out: str, names: Sequence[str]) -> dict[str, CallState]:
    states: dict[str, CallState] = {}
    for name in names:
        states |= load_states(ShardPlace(out, name))
    return states
