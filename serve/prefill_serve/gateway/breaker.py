"""A circuit breaker: an upstream that fails again and again is left alone for a while, then tried by one call."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

_FAILURES = 5  # in a row
_PAUSE_S = 2.0  # doubled with each trial that fails
_LONGEST_PAUSE_S = 60.0


class Breaker:
    """`clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures, self._until, self._pause_s = 0, 0.0, _PAUSE_S
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        """Should the upstream be left alone?"""
        return self._clock() < self._until

    def begin(self) -> None:
        """A call goes out; where it is the trial after a pause, others keep waiting for what becomes of it."""
        if self._failures >= _FAILURES:
            self._until = max(self._until, self._clock() + self._pause_s)
            self._is_tried = True

    def succeed(self) -> None:
        self._failures, self._until, self._pause_s = 0, 0.0, _PAUSE_S
        self._is_tried = False

    def fail(self, retry_after_s: float = 0.0) -> None:
        """Counts a failure; an upstream that says when to come back is left alone until then."""
        self._failures += 1
        pause_s = min(retry_after_s, _LONGEST_PAUSE_S)
        if self._failures == _FAILURES or self._is_tried:  # not of those that were under way before
            self._is_tried = False
            pause_s = max(pause_s, self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._until = max(self._until, self._clock() + pause_s)
