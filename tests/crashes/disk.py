"""A local folder with a crash point before each system call that changes it.

Python's audit events report each call before it is made, whichever library makes it, so that a crash can interrupt the
deletion of a tree or the writing of a file.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crashes.life import Crash, Life, here
from crashes.machine import Machine

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ACTIVE: list[Disk] = []  # at most one


class Disk(Machine):
    """A machine whose storage is a local folder."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.uri = root, str(root / "out")
        root.mkdir(parents=True)
        self._life: Life | None = None
        self._thread = _Thread()

    @contextmanager
    def watched(self, life: Life | None = None) -> Iterator[None]:
        _listen()
        self._life = life
        _ACTIVE[:] = [self]
        try:
            yield
        finally:
            _ACTIVE.clear()
            self._life = None

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Handles each audit event of this process. Raises Crash if the life that causes it ends there."""
        if event not in _EVENTS or self._thread.is_ours:
            return
        life = here() or self._life
        self._thread.is_ours = True  # ignores events that this handler causes
        try:
            if life is not None and (change := _EVENTS[event](*arguments)) is not None:
                self._pass(life, *change)
        finally:
            self._thread.is_ours = False

    def _pass(self, life: Life, what: str, path: str) -> None:
        if not path.startswith(f"{self.root}{os.sep}"):
            return
        if what == "read":
            life.look(f"read {self._shown(path)}")
            return
        self._end_write(life)
        life.reach(f"{what} {self._shown(path)}")
        if what == "open":
            self._thread.written = path

    def _end_write(self, life: Life) -> None:
        """Ends the writing of the file that this thread opened; if the program dies here, keeps half of the file."""
        path, self._thread.written = self._thread.written, None
        if path is None:
            return
        was_alive = life.death is None
        try:
            life.reach(f"write {self._shown(path)}")
        except Crash:
            if was_alive:
                os.truncate(path, Path(path).stat().st_size // 2)
            raise

    def _shown(self, path: str) -> str:
        return path.removeprefix(f"{self.root}{os.sep}")


class _Thread(threading.local):
    is_ours = False
    written: str | None = None  # the file that the thread has opened for writing


def _listen() -> None:
    """Adds the audit hook to this process, once. It cannot be removed, but does nothing without an active disk."""
    if not _listen_once:
        _listen_once.append(True)
        sys.addaudithook(lambda event, arguments: _ACTIVE[0].audit(event, arguments) if _ACTIVE else None)


_listen_once: list[bool] = []

Change = tuple[str, str] | None  # the kind of change, and its path


def _opened(path: Any, _mode: Any, flags: int) -> Change:
    if isinstance(path, int):
        return None
    return "open" if flags & _WRITES else "read", _whole(path)


def _listed(path: Any = ".") -> Change:
    return None if isinstance(path, int) else ("read", _whole(path))


def _linked(source: Any, target: Any, *_folders: int) -> Change:
    return None if Path(target).exists() else ("link", _whole(target))


def _renamed(source: Any, target: Any, *_folders: int) -> Change:
    return "rename", _whole(target)


def _removed(path: Any, folder: int) -> Change:
    return ("remove", _whole(path, folder)) if os.path.lexists(_whole(path, folder)) else None


def _made(path: Any, _mode: int, folder: int) -> Change:
    whole = Path(_whole(path, folder))
    return ("make folder", str(whole)) if whole.parent.exists() and not whole.exists() else None


def _cut(path: Any, _length: int) -> Change:
    return None if isinstance(path, int) else ("cut", _whole(path))


def _whole(path: Any, folder: int = -1) -> str:
    """The absolute form of a path that may be relative to the open folder with descriptor `folder`."""
    base = Path.cwd() if folder < 0 else Path(f"/proc/self/fd/{folder}").readlink()
    return os.path.normpath(base / os.fsdecode(path))


_EVENTS: dict[str, Callable[..., Change]] = {
    "open": _opened,
    "os.listdir": _listed,
    "os.scandir": _listed,
    "os.link": _linked,
    "os.rename": _renamed,
    "os.remove": _removed,
    "os.rmdir": _removed,
    "os.mkdir": _made,
    "os.truncate": _cut,
}
