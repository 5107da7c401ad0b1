"""The ledger: conversations, spending and calls that await feedback, one for all replicas.

With a folder it is persistent: a journal of calls, and the outcomes from feedback, which `train` and `evaluate` read.
Feedback is durable on disk or in the object store before it is acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, model_validator

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.gauges import REFRESHER
from prefill_router.common.schema import (
    AT,
    CALL_ID,
    CALLER,
    CORRECT,
    COST_USD,
    FEEDBACK,
    MESSAGES,
    OUTPUT_TOKENS,
    PROMPT,
    PROMPT_ID,
    PROPENSITY,
    REQUEST_ID,
    TARGET,
)
from prefill_router.common.validation import StrictModel
from prefill_serve.gateway.call_record import Served
from prefill_serve.gateway.gateway_metrics import BudgetMetrics, MemoryMetrics
from prefill_serve.gateway.state.accounts import Accounts, Stats
from prefill_serve.gateway.state.conversations import Conversations, Key
from prefill_serve.gateway.state.remembered import MOST_CALLS, LatestNames, Remembered, bound_prompts, latest
from prefill_serve.gateway.state.reservations import Exhausted, Reserved
from prefill_serve.gateway.state.row_files import Segments
from prefill_serve.settings import DailyLimits, LedgerSettings

log = logging.getLogger("ray.serve")

_KEPT = timedelta(days=7)  # retention of calls in the journal, and so the deadline for feedback
_JOURNAL_S = 1.0
_LOOK_EVERY = 64  # unsaved calls
_UNSAVED, _UNSAVED_BYTES = 10_000, 64 << 20  # limits on unsaved calls and their prompts
_PATIENCE_S = 1.0  # a caller may refer to a call before it is recorded

Row = dict[str, Any]
_T = TypeVar("_T")


class UnknownRequest(UserError):  # noqa: N818 - an answer, not a fault
    """Feedback on an unknown request."""


class OtherFeedback(UserError):  # noqa: N818 - an answer, not a fault
    """The request has different feedback, which is final."""


class LedgerAway(Exception):  # noqa: N818 - a state, not a fault
    """The ledger's process is unavailable; Serve restarts it."""


class NoFeedback(UserError):  # noqa: N818 - an answer, not a fault
    """The endpoint has no folder for feedback."""


_GIVEN = {"not": {"type": "null"}}
_ONE_WAY: list[Any] = [
    {"required": [way], "properties": {way: _GIVEN, other: {"type": "null"}}}
    for way, other in (("correct", "score"), ("score", "correct"))
]


class Feedback(StrictModel):
    """Whether the answer to a request was correct."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": _ONE_WAY, "examples": [{"request_id": "route-3f2a", "correct": True}]}
    )

    request_id: str = Field(min_length=1, description="The answer's header x-request-id")
    correct: bool | None = Field(None, description="Whether the answer was correct; or give a score")
    score: float | None = Field(None, ge=0.0, le=1.0, description="Degree of correctness")
    output_tokens: int | None = Field(None, ge=0, lt=1 << 31, description="Length of the answer [the upstream's usage]")

    @model_validator(mode="after")
    def _one(self) -> Feedback:
        if (self.correct is None) == (self.score is None):
            raise ValueError("give exactly one of correct and score")
        return self

    @property
    def value(self) -> float:
        return self.score if self.score is not None else float(bool(self.correct))


class Bid(NamedTuple):
    """A target that a call may be sent to, with its expected cost; None if unknown."""

    target: str
    usd: float | None
    least_usd: float = 0.0  # minimum to reserve: a guess, or the maximum cost under a hard limit
    lost_usd: float = 0.0  # cost of earlier attempts of the same call


class CallLedger(Protocol):
    """The interface of LocalLedger; calls to another process may fail or take long."""

    async def target(self, keys: Sequence[Key]) -> str | None: ...
    async def target_of_answer(self, key: Key) -> str | None: ...
    async def reserve(self, ticket: str, holder: str, bids: Sequence[Bid]) -> Reserved | Exhausted: ...
    async def renew(self, tickets: Sequence[str]) -> None: ...
    async def record(self, served: Served, keys: Sequence[Key], ticket: str = "") -> None: ...
    async def feedback(self, given: Feedback, holder: str) -> bool: ...
    async def stats(self, holder: str | None) -> Stats: ...


class LocalLedger:
    """A ledger in this process, on one event loop."""

    def __init__(self) -> None:
        self.settings = LedgerSettings()
        self.accounts, self.conversations, self.metrics = Accounts(), Conversations(), BudgetMetrics()
        self._accounts_of: defaultdict[str, Accounts] = defaultdict(Accounts)  # by caller
        self.memory = MemoryMetrics()
        self._remembered: Remembered[_Given] = Remembered()
        self._num_feedback: Counter[str] = Counter()  # by caller
        self._folder: _Folder | None = None
        self._unsaved: list[Served] = []
        self._pending: list[tuple[_Given, Served]] = []
        self._committing, self._journaling = asyncio.Lock(), asyncio.Lock()
        self._saver: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        REFRESHER.add(self._tell_budgets)  # resets the shares on a new day even without calls

    async def configure(self, settings: LedgerSettings) -> None:
        """Applies settings. Reads a new folder first and counts its calls as if they had happened here."""
        if settings.folder != self.settings.folder:
            await self._save()
            self._folder = None
        if settings.folder is not None and self._folder is None:
            folder = _Folder(settings.folder)
            calls, outcomes, num_feedback = await asyncio.to_thread(folder.read, _now() - _KEPT)
            self._num_feedback |= num_feedback
            for served in calls:
                if served.call_id not in self._remembered:
                    self._take(served)
                    if served.answer_key is not None and served.target is not None:
                        self.conversations.keep([bytes.fromhex(served.answer_key)], served.target)
            for row in outcomes:
                if not self._remembered.has_given(row[CALL_ID]):
                    given = _Given(row[CORRECT], row[OUTPUT_TOKENS])
                    given.written.set_result(None)
                    self._remembered.give((row[CALLER], row[REQUEST_ID]), row[CALL_ID], given)
            self._folder = folder
        hard = settings.budgets.hard
        if settings.folder is None and (hard.keys or hard.usd_per_day is not None):
            log.warning("hard limits lose today's spending at a restart: start the endpoint with --feedback FOLDER")
        self.settings = settings
        self._tell_budgets()

    def _tell_budgets(self) -> None:
        self.metrics.spent(self.accounts.shares(self.settings.budgets, _now()))

    async def target(self, keys: Sequence[Key]) -> str | None:
        """The target of the conversation with one of these keys."""
        return self.conversations.target(keys)

    async def target_of_answer(self, key: Key) -> str | None:
        """The target that stores an answer; waits a moment, as the answer may not be recorded yet."""
        return await _awaited(lambda: self.conversations.target([key]))

    async def reserve(self, ticket: str, holder: str, bids: Sequence[Bid]) -> Reserved | Exhausted:
        """Reserves the first bid that fits all budgets, or else the last that fits the hard limits.

        The amount counts as spent until `record`. A ticket has one reservation at a time, which lapses if its call is
        never recorded.
        """
        accounts, budgets, now = self.accounts, self.settings.budgets, _now()
        accounts.reservations.end(ticket)
        costs = [max(accounts.usual_usd(bid.target) if bid.usd is None else bid.usd, bid.least_usd) for bid in bids]

        def fitting(places: Sequence[int], limits: DailyLimits) -> list[int]:
            return [n for n in places if accounts.fits(costs[n] + bids[n].lost_usd, limits, holder, now)]

        allowed = fitting(range(len(bids)), budgets.hard)
        if not allowed:
            return accounts.exhausted(costs[-1] + bids[-1].lost_usd, budgets.hard, holder, now)
        taken = next(iter(fitting(allowed, budgets)), allowed[-1])
        accounts.reservations.make(ticket, holder, costs[taken] + bids[taken].lost_usd)
        return Reserved(taken, costs[taken])

    async def renew(self, tickets: Sequence[str]) -> None:
        """Extends the reservations of calls in progress."""
        self.accounts.reservations.renew(tickets)

    async def record(self, served: Served, keys: Sequence[Key], ticket: str = "") -> None:
        """Records a finished call and ends its reservation."""
        self.accounts.reservations.end(ticket)
        if served.target is not None and served.end != "routed":
            self.conversations.keep(keys, served.target)
        self._take(served)
        self._tell_budgets()
        if self._folder is not None:
            self._unsaved.append(served)
            if len(self._unsaved) % _LOOK_EVERY == 0:  # calls accumulate while the folder is unavailable
                self._unsaved = latest(self._unsaved, _UNSAVED, _UNSAVED_BYTES)
            if self._saver is None or self._saver.done():
                self._saver = asyncio.create_task(self._save_soon())

    async def feedback(self, given: Feedback, holder: str) -> bool:
        """Records feedback durably; returns False if the same was recorded before.

        Raises UserError if there is no folder, the caller made no such call, or it has different feedback.
        """
        if self._folder is None:
            raise NoFeedback("feedback is not enabled: start the endpoint with --feedback FOLDER")
        value, length = _float32(given.value), given.output_tokens
        alias = holder, given.request_id
        if alias not in self._remembered.aliases:
            await _awaited(lambda: self._remembered.call(alias))
        served, known = self._remembered.call(alias), self._remembered.given(alias)
        if known is not None:  # the call itself may be evicted
            if value != known.value or length not in (None, known.output_tokens):
                raise OtherFeedback(f'request "{given.request_id}": already has different feedback, which is final')
            await asyncio.shield(known.written)
            return False
        if served is None or served.target is None or served.prompt_id is None:
            raise UnknownRequest(f'request "{given.request_id}": not found: it may be too old or have no answer')
        if length is None and served.usage is not None:
            length = served.usage.output_tokens
        new = _Given(value, length)
        self._remembered.give(alias, served.call_id, new)
        self._num_feedback[holder] += 1
        self._pending.append((new, served))
        self._tasks.add(task := asyncio.create_task(self._commit(self._folder)))
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(new.written)
        return True

    async def stats(self, holder: str | None) -> Stats:
        """The figures of one caller, or of all callers for None."""
        reserved_usd = self.accounts.reservations.usd()
        if holder is None:
            return self.accounts.stats(_now(), sum(reserved_usd.values()), self._num_feedback.total())
        accounts = self._accounts_of[holder]
        return accounts.stats(_now(), reserved_usd.get(holder, 0.0), self._num_feedback[holder])

    async def close(self) -> None:
        """Saves unsaved calls and pending feedback."""
        await self._save()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, served: Served) -> None:
        self.accounts.book(served)
        self._accounts_of[served.holder].book(served)
        self._remembered.add(served)
        self.memory.holds(len(self._remembered), self._remembered.prompt_bytes)

    async def _commit(self, folder: _Folder) -> None:
        """Writes all pending feedback as one file; more accumulates meanwhile for the next."""
        async with self._committing:
            batch, self._pending = self._pending, []
            if not batch:
                return
            try:
                await asyncio.to_thread(folder.write_outcomes, batch)
            except Exception as error:
                log.exception("feedback not written")
                for given, served in batch:
                    self._remembered.take_back(served.call_id)
                    self._num_feedback[served.holder] -= 1
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
            calls, self._unsaved = self._unsaved, []
            if calls and self._folder is not None:
                try:
                    await asyncio.to_thread(self._folder.write_calls, calls)
                except Exception:
                    log.exception("calls not written to the journal: they will be retried with the next ones")
                    self._unsaved = latest([*calls, *self._unsaved], _UNSAVED, _UNSAVED_BYTES)


class _Given:
    """Feedback on a call; `written` completes once it is durable. Bound to one event loop."""

    def __init__(self, value: float, output_tokens: int | None) -> None:
        self.value, self.output_tokens = value, output_tokens
        self.written: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Folder:
    """The ledger's folder, with subfolders journal, outcomes and prompts."""

    def __init__(self, uri: str) -> None:
        self.journal = Segments(storage.join(uri, "journal"), ".jsonl", _encode_calls, _decode_calls)
        self.outcomes = Segments(storage.join(uri, "outcomes"), ".parquet", _encode_outcomes, _decode_outcomes)
        self.prompts = Segments(storage.join(uri, "prompts"), ".parquet", _encode_prompts, _decode_prompts)
        self._kept_prompts = LatestNames()  # an evicted id may be stored twice, which is harmless

    def read(self, since: datetime) -> tuple[list[Served], list[Row], Counter[str]]:
        """Returns the calls since a time, the latest outcomes, and the number of outcomes by caller, each deduplicated.

        Calls whose prompts exceed the memory limit come without them and can get no feedback.
        """
        self.journal.forget(since)
        self._kept_prompts.update(self.prompts.read(_decode_prompt_ids))
        calls = bound_prompts(served for served in self.journal.read() if served.at >= since)
        callers = {served.call_id: served.holder for served in calls}
        outcomes: dict[str, Row] = {}
        num_outcomes: Counter[str] = Counter()
        for row in self.outcomes.read():
            if row[CALLER] is None:
                row[CALLER] = callers.get(row[CALL_ID], "")
            num_outcomes[row[CALLER]] += row[CALL_ID] not in outcomes
            outcomes[row[CALL_ID]] = row
            if len(outcomes) > MOST_CALLS:
                del outcomes[next(iter(outcomes))]
        return calls, list(outcomes.values()), num_outcomes

    def write_calls(self, calls: Sequence[Served]) -> None:
        self.journal.write(calls, _now())
        _tidy(self.journal)

    def write_outcomes(self, batch: Sequence[tuple[_Given, Served]]) -> None:
        prompts = {served.prompt_id: served.prompt for _, served in batch if served.prompt is not None}
        new = {key: prompt for key, prompt in prompts.items() if key not in self._kept_prompts}
        if new:  # before the outcomes, so that none lacks its prompt
            self.prompts.write([{PROMPT_ID: key, PROMPT: prompt} for key, prompt in new.items()], _now())
            self._kept_prompts.update(new)
            _tidy(self.prompts)
        self.outcomes.write([_outcome(given, served) for given, served in batch], _now())
        _tidy(self.outcomes)


def _tidy(segments: Segments[Any]) -> None:
    """Merges small files; a failure loses nothing."""
    try:
        segments.merge(_now())
    except Exception:
        log.exception("small files not merged", extra={"folder": segments.uri})


def _outcome(given: _Given, served: Served) -> Row:
    return {
        PROMPT_ID: served.prompt_id,
        TARGET: served.target,
        CORRECT: given.value,
        OUTPUT_TOKENS: given.output_tokens,
        COST_USD: served.reported_usd,
        PROPENSITY: served.propensity,
        REQUEST_ID: served.request_id,
        AT: served.at,
        CALLER: served.holder,
        CALL_ID: served.call_id,
    }


def _encode_calls(calls: Sequence[Served]) -> bytes:
    return "".join(f"{served.to_json()}\n" for served in calls).encode()


def _decode_calls(data: bytes) -> list[Served]:
    return [Served.from_json(line) for line in data.splitlines()]


def _encode_outcomes(rows: Sequence[Row]) -> bytes:
    unique = {row[CALL_ID]: row for row in rows}
    return storage.encode_parquet(pa.Table.from_pylist(list(unique.values()), schema=FEEDBACK))


def _decode_outcomes(data: bytes) -> list[Row]:
    """Older files lack caller and call id, and have each request id once."""
    return [{CALLER: None, CALL_ID: row[REQUEST_ID], **row} for row in _decode_table(data)]


def _encode_prompts(rows: Sequence[Row]) -> bytes:
    text = [row[PROMPT] if isinstance(row[PROMPT], str) else None for row in rows]
    messages = [row[PROMPT] if not isinstance(row[PROMPT], str) else None for row in rows]
    table = pa.table(
        {
            PROMPT_ID: pa.array([row[PROMPT_ID] for row in rows], pa.string()),
            PROMPT: pa.array(text, pa.string()),
            MESSAGES: pa.array(messages, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        }
    )
    return storage.encode_parquet(table)


def _decode_table(data: bytes) -> list[Row]:
    rows: list[Row] = pq.read_table(BytesIO(data)).to_pylist()
    return rows


def _decode_prompt_ids(data: bytes) -> list[str | None]:
    ids: list[str | None] = pq.read_table(BytesIO(data), columns=[PROMPT_ID])[PROMPT_ID].to_pylist()
    return ids


def _decode_prompts(data: bytes) -> list[Row]:
    return [{PROMPT_ID: row[PROMPT_ID], PROMPT: row[PROMPT] or row[MESSAGES]} for row in _decode_table(data)]


async def _awaited(find: Callable[[], _T | None]) -> _T | None:
    """Polls `find` for a moment until it returns a value."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + _PATIENCE_S
    while (found := find()) is None and clock() < deadline:
        await asyncio.sleep(0.02)
    return found


def _float32(value: float) -> float:
    """Rounds as the outcomes file does."""
    return float(pa.scalar(value, pa.float32()).as_py())


def _now() -> datetime:
    return datetime.now(UTC)
