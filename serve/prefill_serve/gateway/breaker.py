"""A circuit breaker: leaves a failing upstream alone for a while, on evidence that no single caller can make up.

Failures are counted by caller, and open the breaker only where several callers share them. Failures of one caller, and
statuses that a caller can provoke, such as 404, only raise a doubt, which a probe settles: a small request that the
gateway makes itself. A probe is also the trial after a pause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import monotonic

_FAILURES = 5  # in a row
_OF_OTHERS = 2  # of these, by other callers than the one who has most
_PAUSE_S = 2.0  # doubled with each probe that fails
_LONGEST_PAUSE_S = 60.0
_PROBE_EVERY_S = 10.0  # at most, however often a caller raises a doubt: a probe costs a token


class Breaker:
    """`clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures: Counter[str] = Counter()  # by caller
        self._is_open = self._is_doubted = False
        self._pause_s, self._next_probe = _PAUSE_S, clock()

    @property
    def is_open(self) -> bool:
        """Should the upstream be left alone?"""
        return self._is_open

    @property
    def wants_probe(self) -> bool:
        """Should the upstream be probed: after a pause, or in doubt?"""
        return (self._is_open or self._is_doubted) and self._clock() >= self._next_probe

    def succeed(self) -> None:
        """Closes it: the upstream has answered."""
        self._failures.clear()
        self._is_open = self._is_doubted = False
        self._pause_s = _PAUSE_S

    def fail(self, caller: str, retry_after_s: float = 0.0) -> None:
        """Counts a failure. When to come back may be said to one caller only, so that it alone is a doubt."""
        self._failures[caller] += 1
        failures = self._failures.total()
        of_others = failures - max(self._failures.values())
        if failures >= _FAILURES and of_others >= _OF_OTHERS and not self._is_open:
            self._open(retry_after_s)
        elif failures >= _FAILURES or retry_after_s > 0.0:
            self.doubt()

    def doubt(self) -> None:
        """Notes an answer that a caller can provoke, and that a broken upstream could give too."""
        self._is_doubted = True

    # --- probes --------------------------------------------------------------------------------------------------

    def begin_probe(self) -> None:
        """Holds back other probes until the outcome of this one."""
        self._next_probe = self._clock() + _PROBE_EVERY_S

    def pass_probe(self) -> None:
        """Settles a doubt, or ends a pause. Failures of a closed breaker stay: real calls may fail all the same."""
        if self._is_open:
            self.succeed()
        self._is_doubted = False

    def fail_probe(self, retry_after_s: float = 0.0) -> None:
        self._open(retry_after_s)

    def _open(self, retry_after_s: float) -> None:
        """An upstream that says when to come back is left alone until then."""
        self._is_open, self._is_doubted = True, False
        pause_s = max(self._pause_s, min(retry_after_s, _LONGEST_PAUSE_S))
        self._next_probe = self._clock() + pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
