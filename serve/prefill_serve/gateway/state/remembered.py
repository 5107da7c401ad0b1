"""The ledger's in-memory store of recent calls and feedback, bounded in number and size.

The folder stores all of them. A call that is evicted here can get no feedback, and repeated feedback on it is no longer
recognized.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Generic, TypeVar

from prefill_serve.gateway.call_record import Served

Alias = tuple[str, str]  # caller and request id

MOST_CALLS = 200_000
MOST_PROMPT_BYTES = 256 << 20  # of the stored calls' prompts

Given = TypeVar("Given")


class Remembered(Generic[Given]):
    """Calls and their feedback, with the oldest evicted first.

    Request ids are looked up per caller. If a caller reuses an id, all calls are stored, and the id finds the latest.
    """

    def __init__(self, most_calls: int = MOST_CALLS, most_prompt_bytes: int = MOST_PROMPT_BYTES) -> None:
        self.most_calls, self.most_prompt_bytes = most_calls, most_prompt_bytes
        self.prompt_bytes = 0
        self.num_forgotten = 0  # calls
        self.aliases: dict[Alias, str] = {}  # call_id of the latest call, whose feedback may outlive it
        self._calls: OrderedDict[str, Served] = OrderedDict()  # by call_id, as below
        self._given: dict[str, Given] = {}  # of stored calls
        self._former: OrderedDict[str, tuple[Alias, Given]] = OrderedDict()  # of evicted calls

    def __len__(self) -> int:
        """The number of calls."""
        return len(self._calls)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._calls

    def call(self, alias: Alias) -> Served | None:
        return self._calls.get(self.aliases.get(alias, ""))

    def add(self, served: Served) -> None:
        """Adds a new call, whose feedback may already be here."""
        self._calls[served.call_id] = served
        self.aliases[served.alias] = served.call_id
        self.prompt_bytes += num_bytes(served)
        if (former := self._former.pop(served.call_id, None)) is not None:
            self._given[served.call_id] = former[1]
        while len(self._calls) > self.most_calls or (self.prompt_bytes > self.most_prompt_bytes and self._calls):
            self._forget_oldest()

    def given(self, alias: Alias) -> Given | None:
        call_id = self.aliases.get(alias, "")
        _, former = self._former.get(call_id, (None, None))
        return self._given.get(call_id, former)

    def has_given(self, call_id: str) -> bool:
        return call_id in self._given or call_id in self._former

    def give(self, alias: Alias, call_id: str, given: Given) -> None:
        if call_id in self._calls:
            self._given[call_id] = given
            return
        if self.aliases.get(alias) not in self._calls:
            self.aliases[alias] = call_id
        self._keep_former(alias, call_id, given)

    def take_back(self, call_id: str) -> None:
        """Removes feedback."""
        self._given.pop(call_id, None)
        self._former.pop(call_id, None)

    def _forget_oldest(self) -> None:
        call_id, served = self._calls.popitem(last=False)
        self.prompt_bytes -= num_bytes(served)
        self.num_forgotten += 1
        if (given := self._given.pop(call_id, None)) is not None:
            self._keep_former(served.alias, call_id, given)
        else:
            self._forget_alias(served.alias, call_id)

    def _keep_former(self, alias: Alias, call_id: str, given: Given) -> None:
        self._former[call_id] = alias, given
        while len(self._former) > self.most_calls:
            oldest, (its_alias, _) = self._former.popitem(last=False)
            self._forget_alias(its_alias, oldest)

    def _forget_alias(self, alias: Alias, call_id: str) -> None:
        if self.aliases.get(alias) == call_id:
            del self.aliases[alias]


class LatestNames:
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


def latest(calls: list[Served], most: int, most_bytes: int) -> list[Served]:
    """The last calls, bounded in number and in bytes of their prompts."""
    size = 0
    for place in range(len(calls) - 1, max(-1, len(calls) - most - 1), -1):
        size += num_bytes(calls[place])
        if size > most_bytes:
            return calls[place + 1 :]
    return calls[max(0, len(calls) - most) :]


def bound_prompts(calls: Iterable[Served], most_bytes: int = MOST_PROMPT_BYTES) -> list[Served]:
    """Deduplicates calls, and drops the oldest prompts above a size; calls without one can get no feedback."""
    found: dict[str, Served] = {}
    holding: deque[str] = deque()
    size = 0
    for served in calls:
        if served.call_id in found:
            continue
        found[served.call_id] = served
        holding.append(served.call_id)
        size += num_bytes(served)
        while size > most_bytes:
            oldest = found[holding.popleft()]
            size -= num_bytes(oldest)
            found[oldest.call_id] = replace(oldest, prompt=None, prompt_id=None)
    return list(found.values())


def num_bytes(served: Served) -> int:
    """Memory used by a call's prompt."""
    prompt: Any = served.prompt
    if isinstance(prompt, list):
        return sum(sys.getsizeof(text) for message in prompt for text in message.values())
    return sys.getsizeof(prompt) if isinstance(prompt, str) else 0
