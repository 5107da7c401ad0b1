"""The gateway's ledger under crashes at any moment: acknowledged feedback and booked calls count exactly once."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from crashes.enumeration import Machines, Scenario, crash_everywhere
from crashes.life import mortal
from prefill_router import storage
from prefill_router.common.schema import PROMPT_ID, REQUEST_ID
from prefill_serve.gateway.call_record import CallRecord, Usage
from prefill_serve.gateway.state import call_ledger as module
from prefill_serve.gateway.state import row_files
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.gateway.state.feedback import Feedback, UnknownRequest
from prefill_serve.gateway.state.ledger_folder import LedgerFolder
from prefill_serve.gateway.state.row_files import RowFolder
from prefill_serve.settings import LedgerSettings

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
CALLS = [
    CallRecord(
        request_id=f"r-{i}",
        caller="ann",
        at=NOW,
        end="answered",
        target="small",
        prompt_id=f"p{i}",
        prompt=f"prompt {i}",
        usage=Usage(100, 20, 10),
        cost_usd=2.0**i,
    )
    for i in range(4)
]
NAMES = [call.request_id for call in CALLS]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges files in pairs, with a fixed clock."""
    monkeypatch.setattr(row_files, "MOST_FILES", 2)
    monkeypatch.setattr(module, "_now", lambda: NOW)
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    monkeypatch.setattr(module, "_JOURNAL_S", 0.0)


class Serving(Scenario):
    """Books calls and takes feedback on them, two at a time; a caller without a response sends it again."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.acknowledged: set[str] = set()
        self.booked: set[str] = set()  # request ids of saved calls

    def run(self) -> None:
        asyncio.run(mortal(self._serve()))

    async def _serve(self) -> None:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(folder=self.out, keep_prompts=True))
        for calls in (CALLS[:2], CALLS[2:]):
            await asyncio.gather(*(self._call(ledger, call) for call in calls))
            await ledger._save()
            self.booked.update(call.request_id for call in CALLS if call.call_id in ledger.books.memory)
        await ledger.close()

    async def _call(self, ledger: LocalLedger, call: CallRecord) -> None:
        """Gives feedback; if the ledger has lost the call, makes the call again first."""
        given = Feedback(request_id=call.request_id, correct=True)
        try:
            is_new = await ledger.feedback(given, call.caller)
        except UnknownRequest:
            assert call.request_id not in self.booked, "a call that was saved is forgotten"
            await ledger.record(call, [])
            is_new = await ledger.feedback(given, call.caller)
        assert not (is_new and call.request_id in self.acknowledged), "feedback that was acknowledged is new"
        self.acknowledged.add(call.request_id)

    def check(self) -> None:
        folder = LedgerFolder(self.out)
        outcomes = [row[REQUEST_ID] for row in folder.outcomes.read()]
        prompts = {row[PROMPT_ID] for row in folder.prompts.read()}
        calls = {served.request_id for served in folder.journal.read()}
        assert set(outcomes) >= self.acknowledged
        assert max(Counter(outcomes).values(), default=0) <= 2  # twice if a merge was interrupted; readers deduplicate
        assert calls >= self.booked
        assert prompts >= {call.prompt_id for call in CALLS if call.request_id in outcomes}

    def result(self) -> Any:
        """The state that a new process reads; of a call that was lost before it was saved, only the feedback."""
        self.check()
        return asyncio.run(self._opened())

    async def _opened(self) -> Any:
        ledger = LocalLedger()
        await ledger.configure(LedgerSettings(folder=self.out))
        assert [await ledger.feedback(Feedback(request_id=name, correct=True), "ann") for name in NAMES] == [False] * 4
        stats = await ledger.stats("ann")
        await ledger.close()
        lost = {call.request_id for call in CALLS if call.call_id not in ledger.books.memory}
        assert lost <= self.acknowledged
        lost_usd = sum(call.cost_usd or 0.0 for call in CALLS if call.request_id in lost)
        return stats.feedback, stats.calls + len(lost), stats.spent_today_usd + lost_usd


def test_feedback_counts_once_and_what_was_spent_stays_spent(machines: Machines) -> None:
    assert crash_everywhere(machines, Serving) > 20


class Keeping(Scenario):
    """Writes rows, merges files, and deletes old rows."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.written: set[str] = set()

    def run(self) -> None:
        kept = RowFolder(self.out, ".txt", lambda rows: " ".join(rows).encode(), lambda data: data.decode().split())
        for day in range(6):
            row = f"row-{day}"
            if row not in set(kept.read()):
                kept.write([row], NOW + timedelta(days=day))
                self.written.add(row)
            if day in (2, 4):
                kept.merge(NOW + timedelta(days=day))
        kept.forget(NOW + timedelta(days=2))

    def check(self) -> None:
        held = [row for uri in _files(self.out) for row in storage.read_bytes(uri).decode().split()]
        assert set(held) >= self.written

    def result(self) -> Any:
        self.check()
        return sorted({row for uri in _files(self.out) for row in storage.read_bytes(uri).decode().split()})


def _files(out: str) -> list[str]:
    return storage.list_files(out, [".txt"]) if storage.exists(out) else []


def test_rows_are_kept_while_their_files_are_made_one(machines: Machines) -> None:
    assert crash_everywhere(machines, Keeping, second_crashes=1) > 15
