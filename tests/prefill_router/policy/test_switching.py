"""When a conversation moves to another target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.policy.decision import Decision
from prefill_router.policy.switching import SwitchRule

P = st.floats(0.0, 1.0)
USD = st.floats(0.0, 1.0)


Pair = tuple[float, float]


def decision(target: str = "other", p: Pair = (0.5, 0.5), usd: Pair = (0.01, 0.01), saved: float = 0.0) -> Decision:
    """A decision with figures of the present target and of the other one."""
    names = ("present", "other")
    p_correct, cost_usd = dict(zip(names, p, strict=True)), dict(zip(names, usd, strict=True))
    return Decision(
        target, p_correct, dict.fromkeys(names, 0.0), cost_usd, 1, False, "v", cached_usd={"present": saved}
    )


@pytest.mark.parametrize(("gain", "moves"), [(-0.5, False), (0.0, False), (0.25, False), (0.26, True)])
def test_by_the_margin_a_gain_above_it_moves(gain: float, moves: bool) -> None:
    judgement = SwitchRule(0.25).judge("present", decision(p=(0.5, 0.5 + gain), usd=(0.0, 9.0)))
    assert judgement.moves is moves


@pytest.mark.parametrize(
    ("gain", "usd", "saved", "moves"),
    [
        (0.25, (0.01, 0.034), 0.0, True),  # worth 0.025 USD for 0.024
        (0.25, (0.01, 0.034), 0.002, False),  # for 0.026
        (-0.25, (0.04, 0.01), 0.0, True),  # cheaper by more than its loss is worth
        (-0.25, (0.04, 0.01), 0.02, False),
        (0.0, (0.01, 0.01), 0.0, False),
    ],
)
def test_by_worth_a_move_must_win_more_than_it_costs(gain: float, usd: Pair, saved: float, moves: bool) -> None:
    judgement = SwitchRule(0.05, quality_usd=0.1).judge("present", decision(p=(0.5, 0.5 + gain), usd=usd, saved=saved))
    assert judgement.moves is moves


def test_the_routers_choice_of_the_present_target_stays() -> None:
    for rule in (SwitchRule(0.0), SwitchRule(0.0, 1e9)):
        assert rule.judge("present", decision("present", (0.0, 1.0))) == (False, "the router's choice")


def test_the_reason_has_the_figures() -> None:
    found = decision(p=(0.5, 0.75), usd=(0.03, 0.04), saved=0.02)
    assert (
        SwitchRule(0.25).judge("present", found).why == "P(correct) of other is +0.250, not more than the margin, 0.25"
    )
    assert SwitchRule(0.2).judge("present", found).why == "P(correct) of other is +0.250, more than the margin, 0.2"
    worth = SwitchRule(0.2, 0.1).judge("present", found)
    assert worth == (False, "P(correct) of other is +0.250, worth $0.0250, at $0.0300 more")


@given(P, P, USD, USD, USD, USD)
def test_a_larger_cache_never_makes_a_conversation_move(
    p: float, q: float, present_usd: float, other_usd: float, saved: float, more: float
) -> None:
    rule = SwitchRule(0.0, 0.5)
    before = rule.judge("present", decision(p=(p, q), usd=(present_usd, other_usd), saved=saved))
    after = rule.judge("present", decision(p=(p, q), usd=(present_usd, other_usd), saved=saved + more))
    assert before.moves or not after.moves
