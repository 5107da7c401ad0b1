"""Whether a conversation moves to another target, which has not read it yet.

Source: platform/METHOD.md, "Choosing".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from prefill_router.common.money import usd
from prefill_router.policy.decision import Decision


class Judgement(NamedTuple):
    """Whether a conversation moves, and why."""

    moves: bool
    why: str


@dataclass(frozen=True)
class SwitchRule:
    """Compares the target of a conversation with the router's choice for its next call.

    The conversation moves if the choice has more than `margin` more P(correct) or, with `quality_usd`, the value of
    P(correct) 1 in USD, if its gain is worth more than what it costs beyond the cached price at the present target.
    """

    margin: float
    quality_usd: float | None = None

    def judge(self, present: str, decision: Decision) -> Judgement:
        """Judges a decision with a target, for a conversation that `present` has answered so far."""
        chosen = decision.target
        assert chosen is not None
        if chosen == present:
            return Judgement(moves=False, why="the router's choice")
        gain = decision.p_correct[chosen] - decision.p_correct[present]
        if self.quality_usd is None:
            moves = gain > self.margin
            than = "more than" if moves else "not more than"
            return Judgement(moves, f"P(correct) of {chosen} is {gain:+.3f}, {than} the margin, {self.margin:.3g}")
        extra_usd = decision.next_usd(chosen) - decision.next_usd(present)
        worth_usd = gain * self.quality_usd
        why = f"P(correct) of {chosen} is {gain:+.3f}, worth {usd(worth_usd)}, at {usd(extra_usd)} more"
        return Judgement(worth_usd > extra_usd, why)
