"""What the last call of a conversation tells about the next; test_gateway covers the rest of the planner."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from prefill_router.policy.decision import KnownPrefix
from prefill_router.policy.pool import Target
from prefill_serve.gateway.active_call import Caller
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.planner import Planner, known_prefix
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.gateway.state.conversations import Conversations, Past

PAST = Past("big", input_tokens=12_000, counted_tokens=9_000)


def test_what_usage_has_beyond_the_encoders_count_is_paid_again() -> None:
    assert known_prefix(PAST, 9_500, 300.0) == KnownPrefix("big", 12_000, 3_000)


def test_a_shorter_count_of_the_upstream_adds_nothing() -> None:
    assert known_prefix(Past("big", 8_000, 9_000), 9_500, 300.0) == KnownPrefix("big", 8_000, 0)


@pytest.mark.parametrize(("age_s", "counted", "cached"), [(300.0, 9_000, 12_000), (300.1, 9_000, 0), (1.0, 8_999, 0)])
def test_a_prefix_is_cold_after_its_life_or_once_the_history_is_shorter(
    age_s: float, counted: int, cached: int
) -> None:
    assert known_prefix(PAST._replace(age_s=age_s), counted, 300.0) == KnownPrefix("big", cached, 3_000)


def test_a_history_that_was_replaced_is_cold() -> None:
    assert known_prefix(PAST._replace(age_s=math.inf), 99_000, 1e9).cached_tokens == 0


def test_a_conversation_ages_from_its_last_answer() -> None:
    now_s = 100.0
    kept = Conversations(lambda: now_s)
    kept.keep([b"a"], PAST)
    now_s = 350.0
    assert kept.past([b"a"]) == PAST._replace(age_s=250.0)
    kept.keep([b"a"], PAST)
    assert kept.past([b"a"]) == PAST


@pytest.mark.parametrize(("role", "first"), [("tool", "big"), ("user", "small")])
def test_amid_tools_the_target_that_called_them_comes_first_where_routing_fails(role: str, first: str) -> None:
    targets = [
        Target(name=name, input_price=price, output_price=price) for name, price in (("big", 9.0), ("small", 1.0))
    ]
    router = SimpleNamespace(pool=SimpleNamespace(targets=targets))
    now = SimpleNamespace(primary=SimpleNamespace(router=router), settings=SimpleNamespace(gateway=None))
    endpoint: Any = SimpleNamespace(now=now)
    metrics: Any = SimpleNamespace(defaults=SimpleNamespace(inc=lambda *_, **__: None))
    planner = Planner(endpoint, LocalLedger(), metrics)
    call = ChatCall({"messages": [{"role": "user", "content": "hi"}, {"role": role, "content": "sunny"}]})
    plan = planner._unrouted(call, Caller("ann", "r"), None, TimeoutError(), PAST)
    assert plan.order[0] == first
