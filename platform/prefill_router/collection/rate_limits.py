"""Rate limits of a target: concurrent calls, calls per minute and tokens per minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from prefill_router.policy.pool import Target


class Pace:
    """Spaces out starts, first come first served, so that no minute has more than `per_minute`."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._next_s = 0.0

    def delay_s(self, amount: float, now_s: float) -> float:
        """Schedules `amount` and returns how long to wait before it may start."""
        start_s = max(self._next_s, now_s)
        self._next_s = start_s + amount * 60.0 / self.per_minute
        return start_s - now_s

    def hold(self, seconds: float, now_s: float) -> None:
        """Delays all further starts by `seconds` from now."""
        self._next_s = max(self._next_s, now_s + seconds)


class RateLimits:
    """The limits of one target for one of `num_workers` workers, which share them equally."""

    def __init__(self, target: Target, num_workers: int = 1) -> None:
        assert target.upstream is not None
        upstream = target.upstream
        self._slots = asyncio.Semaphore(max(1, upstream.concurrency // num_workers))
        self._calls = Pace((upstream.requests_per_minute or 1e9) / num_workers)
        self._tokens = Pace((upstream.tokens_per_minute or 1e12) / num_workers)

    @asynccontextmanager
    async def place(self, num_tokens: int) -> AsyncIterator[None]:
        """Waits for a concurrency slot and until a call of `num_tokens` may start; holds the slot meanwhile."""
        async with self._slots:
            now_s = monotonic()
            delay_s = max(self._calls.delay_s(1, now_s), self._tokens.delay_s(num_tokens, now_s))
            await asyncio.sleep(delay_s)
            yield

    def hold(self, seconds: float) -> None:
        """Pauses all calls, as the target requested."""
        self._calls.hold(seconds, monotonic())
