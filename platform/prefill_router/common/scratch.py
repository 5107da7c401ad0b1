"""Temporary folders that are always cleaned up: those of killed processes are removed when the next one is created."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

PREFIX = "prefill-router-"
_OWNER = "prefill-router.owner"


class ScratchFolder:
    """A new empty folder at `path`, until `remove`, the end of a `with` block, or the end of the process.

    Of folders with the same prefix, those whose process was killed are removed first.
    """

    def __init__(self, prefix: str = PREFIX, parent: str | None = None) -> None:
        for folder in abandoned(prefix, parent):
            shutil.rmtree(folder, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        unlocked = self.path / "owner.new"
        self._owner = unlocked.open("w")
        fcntl.flock(self._owner, fcntl.LOCK_EX)  # which ends with this process, however it ends
        unlocked.rename(self.path / _OWNER)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._owner.close()


def abandoned(prefix: str = PREFIX, parent: str | None = None) -> Iterator[Path]:
    """Yields the folders whose process has ended without removing them."""
    for owner in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*/{_OWNER}"):
        if _is_abandoned(owner):
            yield owner.parent


def _is_abandoned(owner: Path) -> bool:
    try:
        with owner.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process lives, or is another user's
        return False
    return True
