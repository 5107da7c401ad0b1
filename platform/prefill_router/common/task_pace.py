"""The pace of a task with many rows: its rate without the start-up, and the time that the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta


class TaskPace:
    """Counts finished rows of `total`, of which `at_once` parts are done at the same time.

    Workers start and load models until the first parts are done, so the rate is measured from then on. Rows of an
    earlier run do not count.
    """

    def __init__(self, total: int, at_once: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.at_once = total, at_once
        self.rows = self.skipped = 0
        self._clock, self._started = clock, clock()
        self._num_parts = self._num_first = 0  # finished parts, and the rows of the first ones
        self._first_s = self._last_s = 0.0  # when the first parts had ended, and when the latest one did

    def skip(self, rows: int) -> None:
        """Counts rows that an earlier run has done."""
        self.skipped += rows

    def add(self, rows: int) -> None:
        """Counts the rows of a finished part."""
        self.rows += rows
        self._num_parts += 1
        self._last_s = self.elapsed_s
        if self._num_parts <= self.at_once:
            self._first_s, self._num_first = self._last_s, self.rows

    @property
    def elapsed_s(self) -> float:
        return max(self._clock() - self._started, 1e-9)

    @property
    def left(self) -> int:
        return max(0, self.total - self.rows - self.skipped)

    @property
    def rows_per_s(self) -> float | None:
        """The rate since the first parts, None until another one is done. It sinks while parts take longer."""
        num_rows = self.rows - self._num_first
        if not num_rows:
            return None
        so_far = (self._last_s - self._first_s) / num_rows
        with_next = (self.elapsed_s - self._first_s) / (num_rows + self._num_first)  # if more parts ended just now
        return 1.0 / max(so_far, with_next, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """The seconds that the rest will take, None while the rate is unknown."""
        rate = self.rows_per_s
        return None if rate is None else max(0.0, self.left / rate - (self.elapsed_s - self._last_s))

    @property
    def done(self) -> str:
        """How many rows are done."""
        return f"{self.rows + self.skipped:,}/{self.total:,}"

    @property
    def eta(self) -> str | None:
        """The time that the rest will take, None while the rate is unknown and once nothing is left."""
        return None if self.eta_s is None or not self.left else f"ETA {timedelta(seconds=round(self.eta_s))}"
