"""A budget that is never exceeded: what a call can cost at most is set aside before it goes out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from prefill_router.collection.target_calls import Spent

_SLICES = 50  # of what is left, that a worker takes at a time


class Purse:
    """The whole budget. Workers draw parts of it, and give back what they did not need."""

    def __init__(self, budget: Spent) -> None:
        self.left = budget

    def draw(self, wanted: Spent) -> Spent:
        """A part that holds `wanted`, or nothing."""
        if not wanted.fits(self.left):
            return Spent()
        part = Spent(max(wanted.usd, self.left.usd / _SLICES), max(wanted.tokens, self.left.tokens // _SLICES))
        self.left -= part
        return part

    def give_back(self, part: Spent) -> None:
        self.left += part


class Allowance:
    """A worker's part of the budget, for one event loop."""

    def __init__(
        self, draw: Callable[[Spent], Awaitable[Spent]], give_back: Callable[[Spent], Awaitable[None]]
    ) -> None:
        self._draw, self._give_back = draw, give_back
        self._left = Spent()
        self._num_reserved = 0
        self._changed = asyncio.Condition()

    async def reserve(self, worst: Spent) -> bool:
        """Sets aside what a call can cost; False where the budget does not reach, even once all others have settled."""
        async with self._changed:
            while True:
                if not worst.fits(self._left):
                    self._left += await self._draw(worst.beyond(self._left))
                if worst.fits(self._left):
                    self._left -= worst
                    self._num_reserved += 1
                    return True
                if not self._num_reserved:
                    return False
                await self._changed.wait()

    async def settle(self, worst: Spent, spent: Spent) -> None:
        """A call has ended: it was `worst` that was set aside for it, and `spent` is gone."""
        async with self._changed:
            self._num_reserved -= 1
            self._left += worst - spent
            self._changed.notify_all()

    async def give_back(self) -> None:
        """Lets other workers have what is not set aside."""
        async with self._changed:
            part, self._left = self._left, Spent()
            await self._give_back(part)
