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
    holder: str
    parts: int  # of a dollar
    until: float


class Reservations:
    """Reservations by ticket, one per call. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._under_way: OrderedDict[str, _Reservation] = OrderedDict()  # the oldest first
        self._parts: Counter[str] = Counter()  # by caller

    def make(self, ticket: str, holder: str, usd: float) -> None:
        """Makes a reservation, replacing the ticket's previous one."""
        self.end(ticket)
        made = _Reservation(holder, round(usd * _PER_USD), self._clock() + LAPSES_S)
        self._under_way[ticket] = made
        self._parts[holder] += made.parts

    def renew(self, tickets: Iterable[str]) -> None:
        """Extends reservations; ignores unknown tickets."""
        for ticket in tickets:
            if ticket in self._under_way:
                until = self._clock() + LAPSES_S
                self._under_way[ticket] = self._under_way[ticket]._replace(until=until)
                self._under_way.move_to_end(ticket)

    def end(self, ticket: str) -> None:
        """Ends a reservation, if there is one."""
        ended = self._under_way.pop(ticket, None)
        if ended is not None:
            self._parts[ended.holder] -= ended.parts
            if not self._parts[ended.holder]:
                del self._parts[ended.holder]

    def usd(self) -> dict[str, float]:
        """Reserved USD by caller."""
        while self._under_way and next(iter(self._under_way.values())).until <= self._clock():
            self.end(next(iter(self._under_way)))
        return {holder: parts / _PER_USD for holder, parts in self._parts.items()}
