"""The run of a program that ends at a moment of our choice, as if its process had been killed there.

A moment is a change of its storage that is about to be made, or the answer to one. What a program does after its death
comes to nothing: its `finally` blocks run on in this process, but every further change of the storage is refused.
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
    """The program is dead. It is no Exception, so that nothing takes it for an error that can be handled."""


class Life:
    """One run, which dies at its moment number `dies_at`, from 1, or never."""

    def __init__(self, number: int = 1, dies_at: int | None = None) -> None:
        self.number, self.dies_at = number, dies_at
        self.moments: list[str] = []
        self.death: str | None = None  # the moment at which it died
        self.at_death: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def reach(self, moment: str) -> None:
        """Passes a moment. Raises Crash where the life ends there, or has ended before."""
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
        """Passes a read of the storage, at which nothing is lost."""

    @contextmanager
    def lived(self) -> Iterator[None]:
        """What runs in this context, and in tasks and threads that asyncio starts from it, belongs to this life."""
        token = _HERE.set(self)
        try:
            yield
        finally:
            _HERE.reset(token)


def here() -> Life | None:
    """The life that this code belongs to."""
    return _HERE.get()


async def mortal(program: Coroutine[Any, Any, T]) -> T:
    """Awaits a program until it ends or dies: what waits for a task that died would wait for ever."""
    life, loop, task = here(), asyncio.get_running_loop(), asyncio.ensure_future(program)
    assert life is not None
    life.at_death = lambda: loop.call_soon_threadsafe(task.cancel)
    loop.set_exception_handler(ignore_the_dead)  # tasks that nobody awaits die unheard
    try:
        return await task
    except asyncio.CancelledError:
        raise Crash(life.death) from None


def ignore_the_dead(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Crash):
        loop.default_exception_handler(context)
