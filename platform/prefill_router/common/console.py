"""What is said on stderr: a line at once, or nothing at all while others would."""

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
    """Says `line` if the block takes longer than `after_s`, even where stderr is silenced meanwhile."""
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
    """Without what native code writes to stderr, such as Ray's core as it starts and stops; exceptions still pass."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
