"""A shard of answers: a row for each prompt and target, written as one object once all that could be asked was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefill_router import storage
from prefill_router.collection.journal import CallState, merged, read_states
from prefill_router.collection.target_calls import Spent, TargetAnswer
from prefill_router.common.schema import ANSWERS

_TOLD = ("finish_reason", "input_tokens", "output_tokens", "cached_tokens", "latency_s")
_NOTES = b"notes"  # in an object's metadata: the files of the journal that it has taken in


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard's object and its notes lie."""

    out: str
    name: str

    @property
    def object(self) -> str:
        return storage.join(self.out, "answers", f"part-{self.name}.parquet")

    @property
    def journal(self) -> str:
        return storage.join(self.out, "journal", self.name)


def load_states(place: ShardPlace) -> dict[str, CallState]:
    """The state of each call of a shard, by its key, from its object and from notes that came after."""
    states: dict[str, CallState] = {}
    taken: list[str] = []
    if storage.exists(place.object):
        table = storage.read_table(place.object)
        taken = (table.schema.metadata or {}).get(_NOTES, b"").decode().split()
        states = {row["key"]: _state(row) for row in table.to_pylist()}
    for key, state in read_states(place.journal, taken).items():
        states[key] = merged(states[key], state) if key in states else state
    return states


def write_states(place: ShardPlace, states: Mapping[str, CallState]) -> None:
    """Writes a shard whole, and removes the notes that it has taken in."""
    notes = storage.list_names(place.journal)
    rows = [_row(key, state) for key, state in states.items()]
    table = pa.Table.from_pylist(rows, schema=ANSWERS.with_metadata({_NOTES: " ".join(notes).encode()}))
    storage.write_bytes(place.object, storage.encode_parquet(table))
    storage.remove(place.journal)


def _row(key: str, state: CallState) -> dict[str, object]:
    answer = state.answer
    told = dict.fromkeys(_TOLD) if answer is None else {name: getattr(answer, name) for name in _TOLD}
    return {
        "key": key,
        "prompt_id": state.prompt_id,
        "target": state.target,
        "answer": None if answer is None else answer.text,
        **told,
        "cost_usd": state.spent.usd,
        "tokens": state.spent.tokens,
        "lost_usd": state.lost.usd,
        "lost_tokens": state.lost.tokens,
        "attempts": state.attempts,
        "reason": None if answer is not None else state.reason,
    }


def _state(row: Mapping[str, Any]) -> CallState:
    answer = None if row["answer"] is None else TargetAnswer(row["answer"], *(row[name] for name in _TOLD))
    return CallState(
        prompt_id=row["prompt_id"],
        target=row["target"],
        answer=answer,
        spent=Spent(row["cost_usd"], row["tokens"]),
        lost=Spent(row["lost_usd"], row["lost_tokens"]),
        attempts=row["attempts"],
        reason=row["reason"],
    )
