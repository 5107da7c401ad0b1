"""The ledger's in-memory store of recent calls and feedback, bounded in number and size.

The folder stores all of them. A call that is evicted here can get no feedback, and repeated feedback on it is no longer
recognized.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from prefill_serve.gateway.call_record import CallRecord

Alias = tuple[str, str]  # caller and request id

MOST_CALLS = 200_000
MOST_PROMPT_BYTES = 256 << 20  # of the stored calls' prompts

FeedbackT = TypeVar("FeedbackT")


class CallMemory(Generic[FeedbackT]):
    """Calls and their feedback, with the oldest evicted first.

    Request ids are looked up per caller. If a caller reuses an id, all calls are stored, and the id finds the latest.
    """

    def __init__(self, most_calls: int = MOST_CALLS, most_prompt_bytes: int = MOST_PROMPT_BYTES) -> None:
        self.most_calls, self.most_prompt_bytes = most_calls, most_prompt_bytes
        self.prompt_bytes = 0
        self.aliases: dict[Alias, str] = {}  # call_id of the latest call, whose feedback may outlive it
        self._calls: OrderedDict[str, CallRecord] = OrderedDict()  # by call_id, as below; the oldest first
        self._feedback: dict[str, FeedbackT] = {}  # of stored calls
        self._evicted: OrderedDict[str, tuple[Alias, FeedbackT]] = OrderedDict()  # of evicted calls

    def __len__(self) -> int:
        """The number of calls."""
        return len(self._calls)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._calls

    @property
    def calls(self) -> Mapping[str, CallRecord]:
        """The calls by call_id, the oldest first."""
        return self._calls

    def call(self, alias: Alias) -> CallRecord | None:
        return self._calls.get(self.aliases.get(alias, ""))

    def add(self, record: CallRecord) -> None:
        """Adds a new call, whose feedback may already be here."""
        self._calls[record.call_id] = record
        self.aliases[record.alias] = record.call_id
        self.prompt_bytes += num_bytes(record)
        if (evicted := self._evicted.pop(record.call_id, None)) is not None:
            self._feedback[record.call_id] = evicted[1]
        while len(self._calls) > self.most_calls or (self.prompt_bytes > self.most_prompt_bytes and self._calls):
            self._evict_oldest()

    def feedback(self, alias: Alias) -> FeedbackT | None:
        call_id = self.aliases.get(alias, "")
        _, evicted = self._evicted.get(call_id, (None, None))
        return self._feedback.get(call_id, evicted)

    def has_feedback(self, call_id: str) -> bool:
        return call_id in self._feedback or call_id in self._evicted

    def all_feedback(self) -> Iterator[tuple[Alias, str, FeedbackT]]:
        """Yields alias, call_id and feedback, that of evicted calls first."""
        for call_id, (alias, feedback) in self._evicted.items():
            yield alias, call_id, feedback
        for call_id, feedback in self._feedback.items():
            yield self._calls[call_id].alias, call_id, feedback

    def add_feedback(self, alias: Alias, call_id: str, feedback: FeedbackT) -> None:
        if call_id in self._calls:
            self._feedback[call_id] = feedback
            return
        if self.aliases.get(alias) not in self._calls:
            self.aliases[alias] = call_id
        self._keep_evicted(alias, call_id, feedback)

    def remove_feedback(self, call_id: str) -> None:
        """Removes feedback."""
        self._feedback.pop(call_id, None)
        self._evicted.pop(call_id, None)

    def _evict_oldest(self) -> None:
        call_id, record = self._calls.popitem(last=False)
        self.prompt_bytes -= num_bytes(record)
        if (feedback := self._feedback.pop(call_id, None)) is not None:
            self._keep_evicted(record.alias, call_id, feedback)
        else:
            self._remove_alias(record.alias, call_id)

    def _keep_evicted(self, alias: Alias, call_id: str, feedback: FeedbackT) -> None:
        self._evicted[call_id] = alias, feedback
        while len(self._evicted) > self.most_calls:
            oldest, (its_alias, _) = self._evicted.popitem(last=False)
            self._remove_alias(its_alias, oldest)

    def _remove_alias(self, alias: Alias, call_id: str) -> None:
        if self.aliases.get(alias) == call_id:
            del self.aliases[alias]


class RecentNames:
    """A set of the most recent names."""

    def __init__(self, most: int = MOST_CALLS) -> None:
        self.most = most
        self._names: OrderedDict[str | None, None] = OrderedDict()

    def __contains__(self, name: str | None) -> bool:
        return name in self._names

    def update(self, names: Iterable[str | None]) -> None:
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
            if len(self._names) > self.most:
                self._names.popitem(last=False)


class UnsavedCalls:
    """The latest calls that the journal lacks, bounded in number and in bytes of their prompts."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._calls: deque[CallRecord] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[CallRecord]:
        return iter(self._calls)

    def extend(self, later: Iterable[CallRecord]) -> None:
        """Adds later calls, and drops the earliest beyond the limits."""
        for record in later:
            self._calls.append(record)
            self._bytes += num_bytes(record)
            while len(self._calls) > self.most or self._bytes > self.most_bytes:
                self._bytes -= num_bytes(self._calls.popleft())


def num_bytes(record: CallRecord) -> int:
    """Memory used by a call's prompt."""
    prompt: Any = record.prompt
    if isinstance(prompt, list):
        return sum(sys.getsizeof(text) for message in prompt for text in message.values())
    return sys.getsizeof(prompt) if isinstance(prompt, str) else 0
