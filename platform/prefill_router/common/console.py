"""Writing to stderr: messages for the user, what a command is doing, and silencing native code that writes there."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TICK_S = 0.5
_DRAWN_AFTER_S = 1.0  # on a terminal
_SAID_AFTER_S, _SAID_EVERY_S = 3.0, 7.0  # elsewhere

_lock = threading.RLock()  # of stderr
_originals: list[int] = []  # copies of stderr while `silent_stderr` discards what is written there


class LiveLine:
    """Reports on stderr what the process is doing, from a background thread.

    A terminal shows one line, which is rewritten in place. Elsewhere a task is reported once it has taken 3 s, and
    something at least every 8 s. `write` and `is_terminal` stand for stderr.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        is_terminal: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._is_terminal, self._clock = write, is_terminal, clock
        self._task: Callable[[], str] | None = None
        self._since = self._said_at = clock()
        self._is_said = self._is_drawn = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def live(self, task: str | Callable[[], str]) -> Iterator[None]:
        """Says what the block does: `task`, or what `doing` names inside. Nothing is said outside such a block."""
        if self._thread is not None:
            with self.doing(task):
                yield
            return
        ended = threading.Event()
        self._said_at = self._clock()
        self._thread = threading.Thread(target=self._run, args=(ended,), name="live line", daemon=True)
        with self.doing(task):
            self._thread.start()
            try:
                yield
            finally:
                ended.set()
                self._thread.join(_TICK_S)  # it may wait for a task's line, which is then dropped
                self._thread = None

    @contextmanager
    def doing(self, task: str | Callable[[], str]) -> Iterator[None]:
        """Names what the block does: a text, to which the time is added, or a function that returns the whole line.

        Nothing is said of a task that is empty. Other threads than the main one name none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = self._switch(self._timed(task) if isinstance(task, str) else task)
        try:
            yield
        finally:
            self._switch(before)

    def say(self, line: str) -> None:
        """Writes a line of its own."""
        with _lock:
            self.clear()
            self._said_at = self._clock()
            self._write(f"{line}\n")

    def tick(self) -> None:
        """Says what the process is doing, if that is due."""
        task, now = self._task, self._clock()
        is_terminal = self._is_terminal()
        if task is None or not (now - self._since >= _DRAWN_AFTER_S if is_terminal else self._is_due(now)):
            return
        line = task()
        with _lock:
            if task is not self._task or not line:
                return
            if is_terminal:
                self._write(f"\r\033[K{line[: _columns() - 1]}")
                self._is_drawn = True
            else:
                self.say(line)
                self._is_said = True

    def _is_due(self, now: float) -> bool:
        quiet_s = now - self._said_at
        is_new = not self._is_said and now - self._since >= _SAID_AFTER_S
        return quiet_s >= (_SAID_AFTER_S if is_new else _SAID_EVERY_S)

    def _timed(self, task: str) -> Callable[[], str]:
        started = self._clock()
        return lambda: task and f"{task} ({self._clock() - started:.0f} s)"

    def _switch(self, task: Callable[[], str] | None) -> Callable[[], str] | None:
        with _lock:
            self.clear()
            before, self._task = self._task, task
            self._since, self._is_said = self._clock(), False
            return before

    def clear(self) -> None:
        """Removes the line, before something else is written to the terminal."""
        with _lock:
            if self._is_drawn:
                self._write("\r\033[K")
                self._is_drawn = False

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(_TICK_S):
            self.tick()


def _write(text: str) -> None:
    with _lock:
        if _originals:
            os.write(_originals[0], text.encode())
        else:
            sys.stderr.write(text)
            sys.stderr.flush()


def _is_terminal() -> bool:
    return os.isatty(_originals[0]) if _originals else sys.stderr.isatty()


def _columns() -> int:
    try:
        return os.get_terminal_size(_originals[0] if _originals else sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


_line = LiveLine(_write, _is_terminal)
say, doing, live, clear = _line.say, _line.doing, _line.live, _line.clear


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Discards what the process writes to stderr, native code included, such as Ray's core at start and shutdown.

    What this module writes is kept.
    """
    with _lock:
        sys.stderr.flush()
        _originals.append(os.dup(2))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
    try:
        yield
    finally:
        with _lock:
            sys.stderr.flush()
            original = _originals.pop()
            os.dup2(original, 2)
            os.close(original)
