"""Budgets of a day: soft ones, beyond which calls go to cheap targets, and hard ones, beyond which they are refused."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from pydantic import Field

from prefill_router.common.validation import StrictModel


class DailyLimits(StrictModel):
    """USD a day, in UTC."""

    usd_per_day: float | None = Field(None, ge=0.0, description="Of all together")
    keys: dict[str, float] = Field(default_factory=dict, description="Of single keys, by the name of their holder")


class HardLimits(DailyLimits):
    """Limits that no call may exceed, a call to a named target neither. Calls count by the most that they can cost."""

    answer_tokens: int = Field(4096, ge=1, description="Limit of the answer to a call that sets none")

    def covers(self, holder: str) -> bool:
        """Is there a limit for calls of this key?"""
        return self.usd_per_day is not None or holder in self.keys


class Budgets(DailyLimits):
    """Soft limits. What is under way counts by its expected cost."""

    tolerance: float | None = Field(None, ge=0.0, le=1.0, description="Of what does not fit [1: the cheapest target]")
    hard: HardLimits = Field(default_factory=HardLimits, description="Limits beyond which calls are refused with 429")

    @property
    def lowest(self) -> DailyLimits:
        """The lower one of a soft and a hard limit, where there are both."""
        of_all = [usd for usd in (self.usd_per_day, self.hard.usd_per_day) if usd is not None]
        both = [*self.keys.items(), *self.hard.keys.items()]
        keys = {name: min(usd for other, usd in both if other == name) for name, _ in both}
        return DailyLimits(usd_per_day=min(of_all, default=None), keys=keys)


class Reserved(NamedTuple):
    """The bid that was taken, by its place, and what is reserved for it."""

    bid: int
    usd: float


class Exhausted(NamedTuple):
    """Why a call is refused: a hard limit has no room for it before `until`."""

    key: str | None  # None: of all together
    limit_usd: float
    left_usd: float
    call_usd: float
    until: datetime
    retry_after_s: int
