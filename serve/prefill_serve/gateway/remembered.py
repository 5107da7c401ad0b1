"""What the ledger keeps in memory of calls and of feedback: the latest, within bounds of their number and size.

A folder keeps all of it. What is forgotten here can have no feedback any more, and feedback that is sent again is not
known to have been.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

from prefill_serve.gateway.served import Served

MOST_CALLS = 200_000
MOST_PROMPT_BYTES = 256 << 20  # of the prompts that calls bring along, where prompts are kept

Given = TypeVar("Given")


class Remembered(Generic[Given]):
    """Calls by their ids, and what was given for them. The oldest are forgotten first."""

    def __init__(self, most_calls: int = MOST_CALLS, most_prompt_bytes: int = MOST_PROMPT_BYTES) -> None:
        self.most_calls, self.most_prompt_bytes = most_calls, most_prompt_bytes
        self.prompt_bytes = 0
        self.num_forgotten = 0  # calls
        self._calls: OrderedDict[str, Served] = OrderedDict()
        self._given: dict[str, Given] = {}  # of these calls
        self._former: OrderedDict[str, Given] = OrderedDict()  # of calls that are forgotten

    def __len__(self) -> int:
        """Calls."""
        return len(self._calls)

    def __iter__(self) -> Iterator[str]:
        """The ids of the calls, the oldest first."""
        return iter(self._calls)

    def call(self, request_id: str) -> Served | None:
        return self._calls.get(request_id)

    def add(self, served: Served) -> None:
        """In place of an earlier call with the same id."""
        self._take_out(served.request_id)
        self._calls[served.request_id] = served
        self.prompt_bytes += num_bytes(served)
        if (given := self._former.pop(served.request_id, None)) is not None:
            self._given[served.request_id] = given
        while len(self._calls) > self.most_calls or (self.prompt_bytes > self.most_prompt_bytes and self._calls):
            self._forget(next(iter(self._calls)))

    def given(self, request_id: str) -> Given | None:
        return self._given.get(request_id) or self._former.get(request_id)

    def give(self, request_id: str, given: Given) -> None:
        if request_id in self._calls:
            self._given[request_id] = given
        else:
            self._keep_former(request_id, given)

    def take_back(self, request_id: str) -> None:
        """What was given."""
        self._given.pop(request_id, None)
        self._former.pop(request_id, None)

    def _forget(self, request_id: str) -> None:
        self._take_out(request_id)
        self.num_forgotten += 1
        if (given := self._given.pop(request_id, None)) is not None:
            self._keep_former(request_id, given)

    def _take_out(self, request_id: str) -> None:
        if (served := self._calls.pop(request_id, None)) is not None:
            self.prompt_bytes -= num_bytes(served)

    def _keep_former(self, request_id: str, given: Given) -> None:
        self._former[request_id] = given
        while len(self._former) > self.most_calls:
            self._former.popitem(last=False)


class LatestNames:
    """Names that were met, the latest of them."""

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
    """The last calls, so many that they stay within a number and a size of their prompts."""
    size = 0
    for place in range(len(calls) - 1, max(-1, len(calls) - most - 1), -1):
        size += num_bytes(calls[place])
        if size > most_bytes:
            return calls[place + 1 :]
    return calls[max(0, len(calls) - most) :]


def bound_prompts(calls: Iterable[Served], most_bytes: int = MOST_PROMPT_BYTES) -> list[Served]:
    """Calls, each once, of which the latest alone have their prompts; the others can have no feedback."""
    found: dict[str, Served] = {}
    holding: deque[str] = deque()
    size = 0
    for served in calls:
        if served.request_id in found:
            continue
        found[served.request_id] = served
        holding.append(served.request_id)
        size += num_bytes(served)
        while size > most_bytes:
            oldest = found[holding.popleft()]
            size -= num_bytes(oldest)
            found[oldest.request_id] = replace(oldest, prompt=None, prompt_id=None)
    return list(found.values())


def num_bytes(served: Served) -> int:
    """What a call's prompt takes of the memory."""
    prompt: Any = served.prompt
    if isinstance(prompt, list):
        return sum(sys.getsizeof(text) for message in prompt for text in message.values())
    return sys.getsizeof(prompt) if isinstance(prompt, str) else 0
