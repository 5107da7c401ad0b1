"""The ledger: conversations, spending and calls that await feedback, one for all replicas.

With a folder it is persistent: a journal of calls, and the outcomes from feedback, which `train` and `evaluate` read.
Feedback is durable on disk or in the object store before it is acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

from prefill_router.common.gauges import REFRESHER
from prefill_router.common.schema import CALL_ID, CALLER, CORRECT, OUTPUT_TOKENS, REQUEST_ID
from prefill_serve.gateway.call_record import CallRecord
from prefill_serve.gateway.gateway_metrics import BudgetMetrics, MemoryMetrics
from prefill_serve.gateway.state.accounts import Stats
from prefill_serve.gateway.state.call_books import CallBooks
from prefill_serve.gateway.state.call_memory import UnsavedCalls
from prefill_serve.gateway.state.conversations import Conversations, Key, MainAgent, Past
from prefill_serve.gateway.state.feedback import (
    ConflictingFeedback,
    Feedback,
    FeedbackDisabled,
    StoredFeedback,
    UnknownRequest,
)
from prefill_serve.gateway.state.ledger_folder import LedgerFolder, Row
from prefill_serve.gateway.state.reservations import Exhausted, Reserved
from prefill_serve.settings import DailyLimits, LedgerSettings

log = logging.getLogger("ray.serve")

_KEPT = timedelta(days=7)  # retention of calls in the journal, and so the deadline for feedback
_JOURNAL_S = 1.0
_UNSAVED, _UNSAVED_BYTES = 10_000, 64 << 20  # limits on unsaved calls and their prompts
_POLL_S = 1.0  # a caller may refer to a call before it is recorded

_T = TypeVar("_T")


class LedgerUnavailable(Exception):  # noqa: N818 - a state, not a fault
    """The ledger's process is unavailable; Serve restarts it."""


class Bid(NamedTuple):
    """A target that a call may be sent to, with its expected cost; None if unknown."""

    target: str
    usd: float | None
    least_usd: float = 0.0  # minimum to reserve: a guess, or the maximum cost under a hard limit
    lost_usd: float = 0.0  # cost of earlier attempts of the same call


class CallLedger(Protocol):
    """The interface of LocalLedger; calls to another process may fail or take long."""

    async def past(self, keys: Sequence[Key], main: MainAgent | None = None) -> Past | None: ...
    async def target_of_answer(self, key: Key) -> str | None: ...
    async def reserve(self, ticket: str, caller: str, bids: Sequence[Bid]) -> Reserved | Exhausted: ...
    async def renew(self, tickets: Sequence[str]) -> None: ...
    async def record(
        self, record: CallRecord, keys: Sequence[Key], ticket: str = "", main: MainAgent | None = None
    ) -> None: ...
    async def feedback(self, given: Feedback, caller: str) -> bool: ...
    async def stats(self, caller: str | None) -> Stats: ...


class LocalLedger:
    """A ledger in this process, on one event loop."""

    def __init__(self) -> None:
        self.settings = LedgerSettings()
        self.books, self.conversations = CallBooks(), Conversations()
        self.metrics, self.memory_metrics = BudgetMetrics(), MemoryMetrics()
        self._folder: LedgerFolder | None = None
        self._unsaved = UnsavedCalls(_UNSAVED, _UNSAVED_BYTES)
        self._pending: list[tuple[StoredFeedback, CallRecord]] = []
        self._committing, self._journaling = asyncio.Lock(), asyncio.Lock()
        self._saver: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        REFRESHER.add(self._set_budget_metrics)  # resets the shares on a new day even without calls

    async def configure(self, settings: LedgerSettings) -> None:
        """Applies settings. Reads a new folder first, and adds its calls to those in memory.

        Raises what reading raises; the folder before it then stays in use, as it does until the new one has been read.
        """
        if settings.folder is None:
            await self._save()
            self._folder = None
        elif self._folder is None or settings.folder != self.settings.folder:
            folder, books = LedgerFolder(settings.folder), CallBooks(self.books.accounts.reservations)
            outcomes, num_feedback = await asyncio.to_thread(_read, folder, books)
            await self._save()
            self._folder = folder
            self._take_over(books, outcomes, num_feedback)
        hard = settings.budgets.hard
        if settings.folder is None and (hard.keys or hard.usd_per_day is not None):
            log.warning("hard limits lose today's spending at a restart: start the endpoint with --feedback FOLDER")
        self.settings = settings
        self._set_budget_metrics()

    def _take_over(self, books: CallBooks, outcomes: Sequence[Row], num_feedback: Counter[str]) -> None:
        """Continues with the books that a folder's calls are in, and with its outcomes."""
        for record in books.memory.calls.values():
            if record.answer_key is not None and record.target is not None:
                self.conversations.keep([bytes.fromhex(record.answer_key)], Past(record.target))
        books.num_feedback = num_feedback
        for row in outcomes:
            given = StoredFeedback(row[CORRECT], row[OUTPUT_TOKENS])
            given.written.set_result(None)
            books.memory.add_feedback((row[CALLER], row[REQUEST_ID]), row[CALL_ID], given)
        books.adopt(self.books)
        self.books = books
        self._set_memory_metrics()

    def _set_budget_metrics(self) -> None:
        self.metrics.spent(self.books.accounts.shares(self.settings.budgets, _now()))

    async def past(self, keys: Sequence[Key], main: MainAgent | None = None) -> Past | None:
        """The conversation with one of these keys, or that of the session's main agent."""
        return self.conversations.past(keys, main)

    async def target_of_answer(self, key: Key) -> str | None:
        """The target that stores an answer; waits a moment, as the answer may not be recorded yet."""
        return await _poll(lambda: self.conversations.target([key]))

    async def reserve(self, ticket: str, caller: str, bids: Sequence[Bid]) -> Reserved | Exhausted:
        """Reserves the first bid that fits all budgets, or else the last that fits the hard limits.

        The amount counts as spent until `record`. A ticket has one reservation at a time, which lapses if its call is
        never recorded.
        """
        accounts, budgets, now = self.books.accounts, self.settings.budgets, _now()
        accounts.reservations.end(ticket)
        costs = [max(accounts.usual_usd(bid.target) if bid.usd is None else bid.usd, bid.least_usd) for bid in bids]

        def fitting(places: Sequence[int], limits: DailyLimits) -> list[int]:
            return [n for n in places if accounts.fits(costs[n] + bids[n].lost_usd, limits, caller, now)]

        allowed = fitting(range(len(bids)), budgets.hard)
        if not allowed:
            return accounts.exhausted(costs[-1] + bids[-1].lost_usd, budgets.hard, caller, now)
        taken = next(iter(fitting(allowed, budgets)), allowed[-1])
        accounts.reservations.make(ticket, caller, costs[taken] + bids[taken].lost_usd)
        return Reserved(taken, costs[taken])

    async def renew(self, tickets: Sequence[str]) -> None:
        """Extends the reservations of calls in progress."""
        self.books.accounts.reservations.renew(tickets)

    async def record(
        self, record: CallRecord, keys: Sequence[Key], ticket: str = "", main: MainAgent | None = None
    ) -> None:
        """Records a finished call and ends its reservation. A call that is recorded already is not counted again."""
        self.books.accounts.reservations.end(ticket)
        if record.call_id in self.books.memory:
            return
        if record.target is not None and record.end != "routed":
            input_tokens = record.counted_tokens if record.usage is None else record.usage.input_tokens
            self.conversations.keep(keys, Past(record.target, input_tokens, record.counted_tokens), main)
        self.books.book(record)
        self._set_budget_metrics()
        self._set_memory_metrics()
        if self._folder is not None:
            self._unsaved.extend([record])
            if self._saver is None or self._saver.done():
                self._saver = asyncio.create_task(self._save_soon())

    async def feedback(self, given: Feedback, caller: str) -> bool:
        """Records feedback durably; returns False if the same was recorded before.

        Raises UserError if there is no folder, the caller made no such call, or it has different feedback.
        """
        if self._folder is None:
            raise FeedbackDisabled("feedback is not enabled: start the endpoint with --feedback FOLDER")
        value, length = _float32(given.value), given.output_tokens
        alias = caller, given.request_id
        if alias not in self.books.memory.aliases:
            await _poll(lambda: self.books.memory.call(alias))
        record, known = self.books.memory.call(alias), self.books.memory.feedback(alias)
        if known is not None:  # the call itself may be evicted
            if value != known.value or length not in (None, known.output_tokens):
                raise ConflictingFeedback(
                    f'request "{given.request_id}": already has different feedback, which is final'
                )
            await asyncio.shield(known.written)
            return False
        if record is None or record.target is None or record.prompt_id is None:
            raise UnknownRequest(f'request "{given.request_id}": not found, too old, or without an answer')
        if length is None and record.usage is not None:
            length = record.usage.output_tokens
        new = StoredFeedback(value, length)
        self.books.memory.add_feedback(alias, record.call_id, new)
        self.books.num_feedback[caller] += 1
        self._pending.append((new, record))
        self._tasks.add(task := asyncio.create_task(self._commit(self._folder)))
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(new.written)
        return True

    async def stats(self, caller: str | None) -> Stats:
        """The figures of one caller, or of all callers for None."""
        return self.books.stats(caller, _now())

    async def close(self) -> None:
        """Saves unsaved calls and pending feedback."""
        await self._save()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _set_memory_metrics(self) -> None:
        self.memory_metrics.holds(len(self.books.memory), self.books.memory.prompt_bytes)

    async def _commit(self, folder: LedgerFolder) -> None:
        """Writes all pending feedback as one file; more accumulates meanwhile for the next."""
        async with self._committing:
            batch, self._pending = self._pending, []
            if not batch:
                return
            try:
                await asyncio.to_thread(folder.write_outcomes, batch, _now())
            except Exception as error:
                log.exception("feedback not written")
                for given, record in batch:
                    self.books.memory.remove_feedback(record.call_id)
                    self.books.num_feedback[record.caller] -= 1
                    given.written.set_exception(error)
                    given.written.exception()  # its callers may have disconnected
                return
            for given, _ in batch:
                given.written.set_result(None)

    async def _save_soon(self) -> None:
        while self._unsaved and self._folder is not None:  # more may arrive while saving
            await asyncio.sleep(_JOURNAL_S)
            await self._save()

    async def _save(self) -> None:
        async with self._journaling:
            calls, self._unsaved = self._unsaved, UnsavedCalls(_UNSAVED, _UNSAVED_BYTES)
            if calls and self._folder is not None:
                try:
                    await asyncio.to_thread(self._folder.write_calls, list(calls), _now(), _now() - _KEPT)
                except Exception:
                    log.exception("calls not written to the journal: they will be retried with the next ones")
                    calls.extend(self._unsaved)  # those that came meanwhile
                    self._unsaved = calls


def _read(folder: LedgerFolder, books: CallBooks) -> tuple[list[Row], Counter[str]]:
    """Books a folder's calls. Returns its latest outcomes, and their number by caller."""
    books.book_all(folder.read_calls(_now() - _KEPT))
    return folder.read_outcomes(books.memory.calls)


async def _poll(find: Callable[[], _T | None]) -> _T | None:
    """Polls `find` for a moment until it returns a value."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + _POLL_S
    while (found := find()) is None and clock() < deadline:
        await asyncio.sleep(0.02)
    return found


def _float32(value: float) -> float:
    """Rounds as the outcomes file does."""
    return float(pa.scalar(value, pa.float32()).as_py())


def _now() -> datetime:
    return datetime.now(UTC)
