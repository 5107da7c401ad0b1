"""A circuit breaker that pauses calls to a failing upstream, on evidence that no single caller can fake.

Failures are counted by caller, and open the breaker only if several callers share them. Failures of one caller, and
statuses that a caller can provoke, such as 404, only raise a doubt. A probe, a small request by the gateway itself,
settles a doubt and ends a pause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import monotonic

_FAILURES = 5  # in a row
_OF_OTHERS = 2  # of these, by callers other than the one with the most
_PAUSE_S = 2.0  # doubled by each failed probe
_LONGEST_PAUSE_S = 60.0
_PROBE_EVERY_S = 10.0  # minimum interval, as each probe costs a token


class Breaker:
    """The breaker of one upstream. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures: Counter[str] = Counter()  # by caller
        self._is_open = self._is_doubted = False
        self._pause_s, self._next_probe = _PAUSE_S, clock()

    @property
    def is_open(self) -> bool:
        """Whether calls should avoid the upstream."""
        return self._is_open

    @property
    def wants_probe(self) -> bool:
        """Whether a probe is due, after a pause or in doubt."""
        return (self._is_open or self._is_doubted) and self._clock() >= self._next_probe

    def succeed(self) -> None:
        """Closes the breaker after an answer."""
        self._failures.clear()
        self._is_open = self._is_doubted = False
        self._pause_s = _PAUSE_S

    def fail(self, caller: str, retry_after_s: float = 0.0) -> None:
        """Counts a failure. A Retry-After may concern one caller only, so on its own it only raises a doubt."""
        self._failures[caller] += 1
        failures = self._failures.total()
        of_others = failures - max(self._failures.values())
        if failures >= _FAILURES and of_others >= _OF_OTHERS and not self._is_open:
            self._open(retry_after_s)
        elif failures >= _FAILURES or retry_after_s > 0.0:
            self.doubt()

    def doubt(self) -> None:
        """Records a failure that a caller can provoke but a broken upstream could cause too."""
        self._is_doubted = True

    # --- probes --------------------------------------------------------------------------------------------------

    def begin_probe(self) -> None:
        """Delays other probes until this one has ended."""
        self._next_probe = self._clock() + _PROBE_EVERY_S

    def pass_probe(self) -> None:
        """Settles a doubt or ends a pause. A closed breaker keeps its failures: real calls may still fail."""
        if self._is_open:
            self.succeed()
        self._is_doubted = False

    def fail_probe(self, retry_after_s: float = 0.0) -> None:
        self._open(retry_after_s)

    def _open(self, retry_after_s: float) -> None:
        """Opens the breaker for the pause, or for a longer Retry-After."""
        self._is_open, self._is_doubted = True, False
        pause_s = max(self._pause_s, min(retry_after_s, _LONGEST_PAUSE_S))
        self._next_probe = self._clock() + pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
