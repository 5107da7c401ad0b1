"""What is written before a call goes out and once its answer has come, so that a process may die at any moment.

Notes are lines of JSON in small files that are whole or absent, and that one process alone has written. An attempt
that is begun and has no end may have been paid for. Once a shard is done its notes are part of it, and are removed.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prefill_router import storage
from prefill_router.collection.target_calls import Spent, TargetAnswer, TargetCall

_SUFFIX = ".jsonl"


@dataclass
class CallState:
    """What is known of a call: its answer, and what was, or may have been, spent on it."""

    prompt_id: str
    target: str
    answer: TargetAnswer | None = None
    spent: Spent = field(default_factory=Spent)  # on the answer
    lost: Spent = field(default_factory=Spent)  # on attempts that may have been paid for, and brought no answer
    attempts: int = 0
    reason: str | None = None  # why the latest attempt brought none


def read_states(uri: str, ignored: Iterable[str] = ()) -> dict[str, CallState]:
    """The state of each call, by its key, that the notes of a shard tell of, but for those in the files `ignored`."""
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
    """The notes of one shard. Those that come while others are written are written together."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._pending: list[tuple[str, asyncio.Future[None]]] = []
        self._writing = asyncio.Lock()

    async def begin(self, call: TargetCall) -> str:
        """Notes that an attempt is about to be made, and returns its name. It may be made once this returns."""
        attempt = uuid.uuid4().hex
        note = {"key": call.key, "prompt_id": call.prompt_id, "target": call.target.name, "worst": asdict(call.worst)}
        await self._write({"kind": "begin", "attempt": attempt, **note})
        return attempt

    async def end(
        self, attempt: str, answer: TargetAnswer | None, spent: Spent, lost: Spent, reason: str | None
    ) -> None:
        """Notes what came of it."""
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
        uri = storage.join(self.uri, f"{uuid.uuid4().hex}{_SUFFIX}")
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
    """What an earlier run left of a call, and what notes add to it."""
    if new.answer is None:
        new = replace(new, answer=old.answer, spent=old.spent)
    return replace(new, lost=old.lost + new.lost, attempts=old.attempts + new.attempts, reason=new.reason or old.reason)
