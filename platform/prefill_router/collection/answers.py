"""Shards of answers: one object with a row for each prompt and target, written when the shard's calls are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefill_router import storage
from prefill_router.collection.journal import CallState, merged, read_states
from prefill_router.collection.target_calls import Spent, TargetAnswer
from prefill_router.common.schema import ANSWERS
from prefill_router.common.usage import Usage

_ANSWER_COLUMNS = ("finish_reason", *Usage._fields, "latency_s")
_NOTES = b"notes"  # metadata key of an object: the journal files that it includes


@dataclass(frozen=True)
class ShardPlace:
    """The locations of a shard's object and of its journal."""

    out: str
    name: str

    @property
    def object(self) -> str:
        return storage.join(self.out, "answers", f"part-{self.name}.parquet")

    @property
    def journal(self) -> str:
        return storage.join(self.out, "journal", self.name)


def load_states(place: ShardPlace) -> dict[str, CallState]:
    """Reads the state of each call of a shard, by call key, from its object and from later journal files."""
    states: dict[str, CallState] = {}
    included: list[str] = []
    if storage.exists(place.object):
        table = storage.read_table(place.object)
        included = (table.schema.metadata or {}).get(_NOTES, b"").decode().split()
        states = {row["key"]: _state(row) for row in table.to_pylist()}
    for key, state in read_states(place.journal, included).items():
        states[key] = merged(states[key], state) if key in states else state
    return states


def write_states(place: ShardPlace, states: Mapping[str, CallState]) -> None:
    """Writes a whole shard, then removes the journal files that it includes."""
    notes = storage.list_names(place.journal)
    rows = [_row(key, state) for key, state in states.items()]
    table = pa.Table.from_pylist(rows, schema=ANSWERS.with_metadata({_NOTES: " ".join(notes).encode()}))
    storage.write_bytes(place.object, storage.encode_parquet(table))
    storage.remove(place.journal)


def _row(key: str, state: CallState) -> dict[str, object]:
    answer = state.answer
    columns = {name: getattr(answer, name, None) for name in _ANSWER_COLUMNS}
    return {
        "key": key,
        "prompt_id": state.prompt_id,
        "target": state.target,
        "answer": None if answer is None else answer.text,
        **columns,
        "cost_usd": state.spent.usd,
        "tokens": state.spent.tokens,
        "lost_usd": state.lost.usd,
        "lost_tokens": state.lost.tokens,
        "attempts": state.attempts,
        "reason": None if answer is not None else state.reason,
    }


def _state(row: Mapping[str, Any]) -> CallState:
    answer = None
    if row["answer"] is not None:  # shards of older releases have fewer columns
        answer = TargetAnswer(row["answer"], **{name: row[name] for name in _ANSWER_COLUMNS if name in row})
    return CallState(
        prompt_id=row["prompt_id"],
        target=row["target"],
        answer=answer,
        spent=Spent(row["cost_usd"], row["tokens"]),
        lost=Spent(row["lost_usd"], row["lost_tokens"]),
        attempts=row["attempts"],
        reason=row["reason"],
    )
