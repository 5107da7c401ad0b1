"""Writing to stderr: messages for the user, and silencing native code that writes there."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@contextmanager
def said_if_slow(line: str, after_s: float = 3.0) -> Iterator[None]:
    """Writes `line` to stderr if the block takes longer than `after_s`, even inside `silent_stderr`."""
    stderr = os.dup(2)
    timer = threading.Timer(after_s, os.write, [stderr, f"{line}\n".encode()])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        os.close(stderr)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Discards what the process writes to stderr, native code included, such as Ray's core at start and shutdown."""
    sys.stderr.flush()
    original, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)
