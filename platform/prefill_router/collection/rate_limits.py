"""What a target allows: so many calls at a time, and so many calls and tokens a minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from prefill_router.policy.pool import Target


class Pace:
    """Spreads out what begins, so that no minute sees more than it may. First come, first served."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._next_s = 0.0

    def delay_s(self, amount: float, now_s: float) -> float:
        """How long to wait before `amount` may begin, which is taken for granted from then on."""
        begins_s = max(self._next_s, now_s)
        self._next_s = begins_s + amount * 60.0 / self.per_minute
        return begins_s - now_s

    def hold(self, seconds: float, now_s: float) -> None:
        """Lets nothing begin for so long."""
        self._next_s = max(self._next_s, now_s + seconds)


class RateLimits:
    """Of one target, for one of `num_workers` that share what it allows."""

    def __init__(self, target: Target, num_workers: int = 1) -> None:
        assert target.upstream is not None
        upstream = target.upstream
        self._places = asyncio.Semaphore(max(1, upstream.concurrency // num_workers))
        self._calls = Pace((upstream.requests_per_minute or 1e9) / num_workers)
        self._tokens = Pace((upstream.tokens_per_minute or 1e12) / num_workers)

    @asynccontextmanager
    async def place(self, num_tokens: int) -> AsyncIterator[None]:
        """A place among the calls, once it is time for one of `num_tokens`."""
        async with self._places:
            now_s = monotonic()
            delay_s = max(self._calls.delay_s(1, now_s), self._tokens.delay_s(num_tokens, now_s))
            await asyncio.sleep(delay_s)
            yield

    def hold(self, seconds: float) -> None:
        """The target has asked for a pause."""
        self._calls.hold(seconds, monotonic())
