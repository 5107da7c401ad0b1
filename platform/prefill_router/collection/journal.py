"""The journal of a shard: a note before each attempt at a call and one after it, so that crashes lose no payment.

Notes are JSON lines in small files, each written atomically by one process. An attempt with a begin note and no end
note may have been paid for. A finished shard includes its notes, and they are removed.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prefill_router import storage
from prefill_router.collection.target_calls import Spent, TargetAnswer, TargetCall

_SUFFIX = ".jsonl"


@dataclass
class CallState:
    """The state of a call: its answer, and what was or may have been spent on it."""

    prompt_id: str
    target: str
    answer: TargetAnswer | None = None
    spent: Spent = field(default_factory=Spent)  # on the answer
    lost: Spent = field(default_factory=Spent)  # on attempts that may have been paid for without an answer
    attempts: int = 0
    reason: str | None = None  # why the latest attempt failed


def read_states(uri: str, ignored: Iterable[str] = ()) -> dict[str, CallState]:
    """Reads the state of each call, by call key, from a shard's notes, except those in the files `ignored`."""
    names = [name for name in storage.list_names(uri) if name.endswith(_SUFFIX) and name not in set(ignored)]
    notes = [
        json.loads(line)
        for data in storage.read_many([storage.join(uri, name) for name in names])
        for line in data.splitlines()
    ]
    states: dict[str, CallState] = {}
    ends = {note["attempt"]: note for note in notes if note["kind"] == "end"}
    for note in notes:
        if note["kind"] == "begin":
            _apply(
                states.setdefault(note["key"], CallState(note["prompt_id"], note["target"])),
                note,
                ends.get(note["attempt"]),
            )
    return states


def _apply(state: CallState, begin: dict[str, Any], end: dict[str, Any] | None) -> None:
    state.attempts += 1
    if end is None:
        state.lost += Spent(**begin["worst"])
        return
    state.lost += Spent(**end["lost"])
    if end["answer"] is not None:
        state.answer, state.spent = TargetAnswer(**end["answer"]), Spent(**end["spent"])
    state.reason = end["reason"]


class Journal:
    """Writes the notes of one shard. Notes that arrive during a write are batched into the next file."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._pending: list[tuple[str, asyncio.Future[None]]] = []
        self._writing = asyncio.Lock()

    async def begin(self, call: TargetCall) -> str:
        """Notes the start of an attempt and returns its id. Call this before sending the request."""
        attempt = uuid.uuid4().hex
        note = {"key": call.key, "prompt_id": call.prompt_id, "target": call.target.name, "worst": asdict(call.worst)}
        await self._write({"kind": "begin", "attempt": attempt, **note})
        return attempt

    async def end(
        self, attempt: str, answer: TargetAnswer | None, spent: Spent, lost: Spent, reason: str | None
    ) -> None:
        """Notes the result of an attempt."""
        body = None if answer is None else asdict(answer)
        note = {"answer": body, "spent": asdict(spent), "lost": asdict(lost), "reason": reason}
        await self._write({"kind": "end", "attempt": attempt, **note})

    async def _write(self, note: dict[str, Any]) -> None:
        written = asyncio.get_running_loop().create_future()
        self._pending.append((json.dumps(note), written))
        async with self._writing:
            batch, self._pending = self._pending, []
            if batch:
                await self._write_batch(batch)
        await written

    async def _write_batch(self, batch: list[tuple[str, asyncio.Future[None]]]) -> None:
        data = "".join(f"{line}\n" for line, _ in batch).encode()
        uri = storage.join(self.uri, f"{time.time_ns():020}-{uuid.uuid4().hex}{_SUFFIX}")  # names sort by time
        try:
            await asyncio.to_thread(storage.write_bytes, uri, data)
        except Exception as error:
            for _, written in batch:
                written.set_exception(error)
                written.exception()
            return
        for _, written in batch:
            written.set_result(None)


def merged(old: CallState, new: CallState) -> CallState:
    """Adds the state from new notes to a call's earlier state."""
    if new.answer is None:
        new = replace(new, answer=old.answer, spent=old.spent)
    return replace(new, lost=old.lost + new.lost, attempts=old.attempts + new.attempts, reason=new.reason or old.reason)
