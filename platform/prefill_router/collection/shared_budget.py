"""A budget that is never exceeded: the worst-case cost of a call is reserved before it is made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from prefill_router.collection.target_calls import Spent

_SLICES = 50  # a worker draws at least 1/50 of what is left


class SharedBudget:
    """The whole budget. Workers draw parts of it and return what they do not use."""

    def __init__(self, budget: Spent) -> None:
        self.left = budget

    def draw(self, wanted: Spent) -> Spent:
        """Takes out at least `wanted`, or nothing if not enough is left."""
        if not wanted.fits(self.left):
            return Spent()
        part = Spent(max(wanted.usd, self.left.usd / _SLICES), max(wanted.tokens, self.left.tokens // _SLICES))
        self.left -= part
        return part

    def give_back(self, part: Spent) -> None:
        self.left += part


class Allowance:
    """A worker's part of the budget, used in one event loop."""

    def __init__(
        self, draw: Callable[[Spent], Awaitable[Spent]], give_back: Callable[[Spent], Awaitable[None]]
    ) -> None:
        self._draw, self._give_back = draw, give_back
        self._left = Spent()
        self._num_reserved = 0
        self._changed = asyncio.Condition()

    async def reserve(self, worst: Spent) -> bool:
        """Reserves a call's worst-case cost; returns False if the budget cannot cover it, after waiting for others."""
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
        """Ends a call: releases its reservation `worst` and books `spent`."""
        async with self._changed:
            self._num_reserved -= 1
            self._left += worst - spent
            self._changed.notify_all()

    async def give_back(self) -> None:
        """Returns everything that is not reserved to the whole budget."""
        async with self._changed:
            part, self._left = self._left, Spent()
            await self._give_back(part)
