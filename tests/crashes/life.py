"""A life: one run of a program that can be ended at any moment, as if its process were killed.

A moment is a crash point: just before a change of the storage, or just before the response to it. After its death, a
program has no effect: its `finally` blocks still run in this process, but each further change of the storage fails.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_HERE: ContextVar[Life | None] = ContextVar("life", default=None)


class Crash(BaseException):
    """Raised in a dead program. Not a subclass of Exception, so that the program does not handle it."""


class Life:
    """One run, which dies at its moment number `dies_at`, counted from 1, or never."""

    def __init__(self, number: int = 1, dies_at: int | None = None) -> None:
        self.number, self.dies_at = number, dies_at
        self.moments: list[str] = []
        self.death: str | None = None  # the moment at which it died
        self.at_death: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def reach(self, moment: str) -> None:
        """Passes a moment. Raises Crash if the life ends there or has ended before."""
        with self._lock:
            is_first = False
            if self.death is None:
                self.moments.append(moment)
                if is_first := len(self.moments) == self.dies_at:
                    self.death = moment
        if is_first:
            self.at_death()
        if self.death is not None:
            raise Crash(self.death)

    def look(self, what: str) -> None:
        """Passes a read of the storage, which is no crash point."""

    @contextmanager
    def lived(self) -> Iterator[None]:
        """Assigns the code in this context, and in tasks and threads that asyncio starts from it, to this life."""
        token = _HERE.set(self)
        try:
            yield
        finally:
            _HERE.reset(token)


def here() -> Life | None:
    """The life that this code belongs to."""
    return _HERE.get()


async def mortal(program: Coroutine[Any, Any, T]) -> T:
    """Awaits a program until it ends or dies; otherwise, code that waits for a dead task would hang."""
    life, loop, task = here(), asyncio.get_running_loop(), asyncio.ensure_future(program)
    assert life is not None
    life.at_death = lambda: loop.call_soon_threadsafe(task.cancel)
    loop.set_exception_handler(ignore_the_dead)  # hides the death of tasks that are not awaited
    try:
        return await task
    except asyncio.CancelledError:
        raise Crash(life.death) from None


def ignore_the_dead(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Crash):
        loop.default_exception_handler(context)
