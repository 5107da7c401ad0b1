"""What calls under way are expected to cost: it counts as if it were spent, until what they did cost is known."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from datetime import datetime
from time import monotonic
from typing import NamedTuple

LAPSES_S = 600.0  # unless renewed: where a replica dies, nobody says what became of its calls
_PER_USD = 10**12  # whole numbers, so that what is given back leaves nothing


class Reserved(NamedTuple):
    """The bid that was taken, by its place, and what is reserved for it."""

    bid: int
    usd: float


class Exhausted(NamedTuple):
    """Why a call is refused: a hard limit has no room for it before `until`."""

    key: str | None  # None: of all together
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
    """By ticket: each call has one of its own. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._under_way: OrderedDict[str, _Reservation] = OrderedDict()  # the oldest first
        self._parts: Counter[str] = Counter()  # by holder

    def make(self, ticket: str, holder: str, usd: float) -> None:
        """In place of what the ticket had."""
        self.end(ticket)
        made = _Reservation(holder, round(usd * _PER_USD), self._clock() + LAPSES_S)
        self._under_way[ticket] = made
        self._parts[holder] += made.parts

    def renew(self, tickets: Iterable[str]) -> None:
        """Puts off their lapse; some may have ended."""
        for ticket in tickets:
            if ticket in self._under_way:
                until = self._clock() + LAPSES_S
                self._under_way[ticket] = self._under_way[ticket]._replace(until=until)
                self._under_way.move_to_end(ticket)

    def end(self, ticket: str) -> None:
        """There may be none."""
        ended = self._under_way.pop(ticket, None)
        if ended is not None:
            self._parts[ended.holder] -= ended.parts
            if not self._parts[ended.holder]:
                del self._parts[ended.holder]

    def usd(self) -> dict[str, float]:
        """By holder."""
        while self._under_way and next(iter(self._under_way.values())).until <= self._clock():
            self.end(next(iter(self._under_way)))
        return {holder: parts / _PER_USD for holder, parts in self._parts.items()}
