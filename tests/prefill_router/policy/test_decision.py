"""Decisions in a conversation, whose prompt begins with what a target has read before."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_router.policy.decision import Decision, KnownPrefix, Policy, Prediction, decide_one, explain
from prefill_router.policy.pool import Pool, Target

BIG = Target(name="big", input_price=3.0, output_price=15.0, cached_input_price=0.3)
MID = Target(name="mid", input_price=1.0, output_price=5.0)
POOL = Pool(name="pool", targets=(BIG, MID))
ANY = Policy()
ALIKE = Prediction(np.array([0.8, 0.8], np.float32), np.array([100.0, 100.0], np.float32))


def decided(known: KnownPrefix | None, policy: Policy = ANY, input_tokens: int = 10_000) -> Decision:
    return decide_one(POOL, ALIKE, input_tokens, False, policy, 0.0, "v", known)


def test_a_prefix_is_priced_as_cached_at_its_reader_only() -> None:
    decision = decided(KnownPrefix("big", 9_000))
    assert decision.next_usd("big") == pytest.approx((1_000 * 3.0 + 9_000 * 0.3 + 100 * 15.0) / 1e6)
    assert decision.next_usd("mid") == pytest.approx((10_000 * 1.0 + 100 * 5.0) / 1e6)
    assert decision.target == "big"
    assert decided(None).target == "mid"


def test_the_expected_cost_itself_is_that_without_a_cache() -> None:
    assert decided(KnownPrefix("big", 9_000)).expected_cost_usd == decided(None).expected_cost_usd


def test_tokens_that_the_encoder_does_not_count_are_paid_at_each_target() -> None:
    decision = decided(KnownPrefix("big", 0, 5_000))
    assert decision.expected_cost_usd == decided(None, input_tokens=15_000).expected_cost_usd
    assert decision.input_tokens == 10_000
    assert decision.next_usd("big") == decision.expected_cost_usd["big"]


def test_a_target_without_a_cached_price_or_outside_the_pool_saves_nothing() -> None:
    for target in ("mid", "gone"):
        decision = decided(KnownPrefix(target, 9_000))
        assert decision.target == "mid"
        assert {name: decision.next_usd(name) for name in POOL.target_names} == decision.expected_cost_usd


def test_the_limit_on_cost_applies_to_the_price_with_the_cache() -> None:
    policy = Policy(max_cost=0.009, allowed=["big"])
    assert decided(None, policy).target is None
    decision = decided(KnownPrefix("big", 9_000), policy)
    assert decision.target == "big"
    assert explain(decision, policy, 0.0)["big"].code == "chosen"
