"""What long work says on stderr: one line in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from prefill_router.console import say

_LINE_EVERY_S = 10.0


class Progress:
    """Counts what is done of `total` rows and says so on stderr."""

    def __init__(self, task: str, total: int) -> None:
        self.task, self.total = task, total
        self.rows = self.tokens = 0
        self.started = self.said = time.monotonic()
        self._say(f"{task}: {total:,} prompts")

    def add(self, rows: int, tokens: int = 0) -> None:
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        now = time.monotonic()
        if sys.stderr.isatty() or now - self.said >= _LINE_EVERY_S or self.rows >= self.total:
            self.said = now
            self._say(self._line(now - self.started))

    def _line(self, elapsed_s: float) -> str:
        parts = [f"{self.task}: {self.rows:,}/{self.total:,} prompts"]
        if self.tokens and elapsed_s > 0:
            parts.append(f"{self.tokens / elapsed_s:,.0f} tokens/s")
        if self.rows >= self.total:
            parts.append(f"{elapsed_s:.0f} s")
        elif self.rows:
            remaining_s = elapsed_s / self.rows * (self.total - self.rows)
            parts.append(f"ETA {timedelta(seconds=round(remaining_s))}")
        return " · ".join(parts)

    def _say(self, line: str) -> None:
        if not sys.stderr.isatty():
            say(line)
            return
        sys.stderr.write(f"\r\033[K{line}" + "\n" * (self.rows >= self.total))
        sys.stderr.flush()
