"""The processes that a process has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil


def family(pid: int) -> list[int]:
    """A process, those that it started, those that they started, and the forks that run in the place of any of them."""
    children: dict[int, list[int]] = {}
    for child, parent in (*_parents(), *_forks()):
        children.setdefault(parent, []).append(child)
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """The family of a process without itself, and without those that end meanwhile."""
    found = []
    for pid in family(process.pid)[1:]:
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it has ended
                continue


def _forks() -> Iterator[tuple[int, int]]:
    """Forks, and the processes in whose place they run; see `forks`."""
    for file in Path(os.environ.get("TEST_FORKS", "")).parent.glob("[0-9]*"):
        try:
            yield int(file.read_text()), int(file.name)
        except (OSError, ValueError):  # it has ended or just begins
            continue
