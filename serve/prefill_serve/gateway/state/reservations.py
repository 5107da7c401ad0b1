"""Reservations: the expected cost of calls in progress, which counts as spent until the actual cost is known."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from datetime import datetime
from time import monotonic
from typing import NamedTuple

LAPSES_S = 600.0  # unless renewed: a dead replica never ends its reservations
_PER_USD = 10**12  # integers, so that ended reservations sum to exactly 0


class Reserved(NamedTuple):
    """The index of the bid taken, and the amount reserved for it."""

    bid: int
    usd: float


class Exhausted(NamedTuple):
    """A hard limit that has no room for a call before `until`."""

    key: str | None  # the caller; None: all callers together
    limit_usd: float
    left_usd: float
    call_usd: float
    until: datetime
    retry_after_s: int


class _Reservation(NamedTuple):
    caller: str
    parts: int  # of a dollar
    until: float


class Reservations:
    """Reservations by ticket, one per call. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._in_progress: OrderedDict[str, _Reservation] = OrderedDict()  # the oldest first
        self._parts: Counter[str] = Counter()  # by caller

    def make(self, ticket: str, caller: str, usd: float) -> None:
        """Makes a reservation, replacing the ticket's previous one."""
        self.end(ticket)
        made = _Reservation(caller, round(usd * _PER_USD), self._clock() + LAPSES_S)
        self._in_progress[ticket] = made
        self._parts[caller] += made.parts

    def renew(self, tickets: Iterable[str]) -> None:
        """Extends reservations; ignores unknown tickets."""
        for ticket in tickets:
            if ticket in self._in_progress:
                until = self._clock() + LAPSES_S
                self._in_progress[ticket] = self._in_progress[ticket]._replace(until=until)
                self._in_progress.move_to_end(ticket)

    def end(self, ticket: str) -> None:
        """Ends a reservation, if there is one."""
        ended = self._in_progress.pop(ticket, None)
        if ended is not None:
            self._parts[ended.caller] -= ended.parts
            if not self._parts[ended.caller]:
                del self._parts[ended.caller]

    def usd(self) -> dict[str, float]:
        """Reserved USD by caller."""
        while self._in_progress and next(iter(self._in_progress.values())).until <= self._clock():
            self.end(next(iter(self._in_progress)))
        return {caller: parts / _PER_USD for caller, parts in self._parts.items()}
