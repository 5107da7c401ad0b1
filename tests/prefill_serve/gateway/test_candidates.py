"""Targets that can take a call, their default order, and when a conversation stays with its own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prefill_router.policy.decision import Decision, KnownPrefix, Policy, Prediction, decide_one
from prefill_router.policy.pool import Pool, Target, Upstream
from prefill_router.policy.switching import SwitchRule
from prefill_serve.gateway.candidates import (
    Candidate,
    FixedPlan,
    RoutedPlan,
    can_take,
    default_order,
    estimated_tokens,
)
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.responses_calls import ResponsesCall

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 300_000}}
TOOL = {"type": "function", "function": {"name": "f"}}


def target(name: str = "t", price: float = 1.0, responses: bool = False, **fields: Any) -> Target:
    upstream = Upstream(base_url="http://127.0.0.1/v1", responses=responses)
    return Target(**{"name": name, "input_price": price, "output_price": price, "upstream": upstream, **fields})


def chat(content: Any = "hello", **fields: Any) -> ChatCall:
    return ChatCall({"messages": [{"role": "user", "content": content}], **fields})


TARGETS = [target("big", 5.0), target("small", 1.0), target("middle", 3.0)]


def test_without_a_default_the_cheapest_is_first() -> None:
    assert default_order(TARGETS, None, None) == ["small", "middle", "big"]


def test_the_price_is_of_input_and_output_together() -> None:
    cheap_input = target("cheap input", input_price=0.1, output_price=10.0)
    assert default_order([cheap_input, *TARGETS], None, None)[-2:] == ["big", "cheap input"]


def test_the_default_comes_before_those_by_their_price() -> None:
    assert default_order(TARGETS, "middle", None) == ["middle", "small", "big"]


def test_equal_prices_stay_in_the_order_of_the_pool() -> None:
    assert default_order([target("b"), target("a")], None, None) == ["b", "a"]


def test_the_callers_wish_holds_for_the_default_too() -> None:
    assert default_order(TARGETS, "middle", ["big", "small"]) == ["small", "big"]


def test_a_fixed_order_gives_the_first_that_is_left() -> None:
    plan = FixedPlan(["a", "b", "c"], 0)
    assert plan.choose({"c", "b"}) == Candidate("b", None)
    assert plan.choose([]) is None
    assert plan.choose(["other"]) is None


@pytest.mark.parametrize(
    ("fields", "call"),
    [
        ({"upstream": None}, chat()),
        ({"tools": False}, chat(tools=[TOOL])),
        ({"tools": False}, chat(functions=[{"name": "f"}])),
        ({"images": False}, chat([{"type": "text", "text": "what is this?"}, IMAGE])),
        ({"responses": False}, ResponsesCall({"input": "hello"})),
    ],
)
def test_a_target_that_lacks_something_takes_no_call_that_needs_it(fields: dict[str, Any], call: Call) -> None:
    assert not can_take(target(**fields), call, 10)


@pytest.mark.parametrize(
    "call",
    [chat(), chat(tools=[]), chat([{"type": "text", "text": "hello"}]), ResponsesCall({"input": "hello"})],
)
def test_a_target_that_can_do_little_takes_a_plain_call(call: Call) -> None:
    assert can_take(target(tools=False, images=False, responses=True), call, 10)


def test_prompt_and_reserved_answer_must_fit_into_the_context() -> None:
    small = target(context_tokens=100)
    assert can_take(small, chat(max_tokens=40), 60)
    assert not can_take(small, chat(max_tokens=41), 60)
    assert not can_take(small, chat(), 101)
    assert can_take(target(), chat(max_tokens=10**9), 10**9)


@pytest.mark.parametrize(
    "content", ["a" * 300, [{"type": "text", "text": "a" * 100}, {"type": "text", "text": "b" * 200}]]
)
def test_text_is_guessed_to_have_a_token_for_three_characters(content: Any) -> None:
    assert estimated_tokens(chat(content)) == 100


def test_an_image_is_not_guessed_to_be_a_long_text() -> None:
    call = chat([{"type": "text", "text": "what is this?"}, IMAGE])
    assert can_take(target(context_tokens=8_192), call, estimated_tokens(call))


def test_messages_without_text_have_no_tokens() -> None:
    assert estimated_tokens(ChatCall({"messages": [{"role": "assistant", "content": None}, {"role": "user"}]})) == 0


# --- conversations -----------------------------------------------------------------------------------------------

POOL = Pool(
    name="pool",
    targets=(
        Target(name="big", input_price=3.0, output_price=15.0, cached_input_price=0.3),
        Target(name="small", input_price=1.0, output_price=5.0, cached_input_price=0.1),
    ),
)
INPUT_TOKENS = 10_000


class FakeRouting:
    """A prompt with these P(correct) of big and small."""

    reading = SimpleNamespace(input_tokens=INPUT_TOKENS)

    def __init__(self, *p: float) -> None:
        self.prediction = Prediction(np.array(p, np.float32), np.array([100.0, 100.0], np.float32))

    def decide(self, policy: Policy, *, explores: bool = True, known: KnownPrefix | None = None) -> Decision:
        decision = decide_one(POOL, self.prediction, INPUT_TOKENS, False, policy, 0.0, "v", known)
        return replace(decision, is_explored=explores)


def planned(*p: float, sticky: str | None = "big", cached: int = 0, rule: SwitchRule, **fields: Any) -> RoutedPlan:
    routing: Any = FakeRouting(*p)
    known = None if sticky is None else KnownPrefix(sticky, cached)
    policy = fields.pop("policy", Policy())
    return RoutedPlan(routing, policy, sticky, rule, known, **fields)


def chosen(plan: RoutedPlan, *among: str) -> tuple[str, str | None]:
    candidate = plan.choose(among or POOL.target_names)
    assert candidate is not None
    return candidate.target, candidate.why


MARGIN, WORTH = SwitchRule(0.05), SwitchRule(0.05, quality_usd=0.05)


def test_by_the_margin_a_conversation_moves_for_more_quality_only() -> None:
    kept = chosen(planned(0.5, 0.54, rule=MARGIN))
    assert kept == ("big", "kept: P(correct) of small is +0.040, not more than the margin, 0.05")
    moved = chosen(planned(0.5, 0.56, rule=MARGIN))
    assert moved == ("small", "moved: P(correct) of small is +0.060, more than the margin, 0.05")
    assert chosen(planned(0.5, 0.9, sticky="small", rule=MARGIN)) == ("small", "kept: the router's choice")


def test_by_worth_a_conversation_stays_while_its_cache_is_worth_more_than_the_gain() -> None:
    kept = chosen(planned(0.5, 0.56, cached=9_000, rule=WORTH))
    assert kept == ("big", "kept: P(correct) of small is +0.060, worth $0.00300, at $0.00330 more")
    moved = chosen(planned(0.5, 0.56, cached=0, rule=WORTH))
    assert moved == ("small", "moved: P(correct) of small is +0.060, worth $0.00300, at -$0.0210 more")


def test_a_new_conversation_is_routed_without_a_reason() -> None:
    plan = planned(0.5, 0.5, sticky=None, rule=MARGIN)
    candidate = plan.choose(POOL.target_names)
    assert candidate is not None
    assert candidate.decision is not None
    assert (candidate.target, candidate.why, candidate.decision.is_explored) == ("small", None, True)


@pytest.mark.parametrize("rule", [MARGIN, WORTH])
def test_amid_tools_a_conversation_stays_whatever_would_be_won(rule: SwitchRule) -> None:
    plan = planned(0.0, 1.0, rule=rule, is_amid_tools=True)
    assert chosen(plan) == ("big", "kept: the call carries results of tools")
    assert chosen(plan.over_budget(None)) == ("big", "kept: the call carries results of tools")
    assert chosen(replace(plan, is_amid_tools=False).over_budget(None)) == ("small", None)


@pytest.mark.parametrize("is_amid_tools", [False, True])
def test_a_conversation_moves_if_its_target_cannot_be_asked(is_amid_tools: bool) -> None:
    moved = ("small", "moved: big cannot be asked for this call")
    assert chosen(planned(1.0, 0.0, rule=MARGIN, is_amid_tools=is_amid_tools), "small") == moved
    forbidden = planned(1.0, 0.0, rule=MARGIN, is_amid_tools=is_amid_tools, policy=Policy(max_cost=0.02))
    assert chosen(forbidden) == moved
    assert forbidden.choose(["big"]) is None


def test_the_cached_price_is_what_is_reserved() -> None:
    candidate = planned(0.5, 0.5, cached=9_000, rule=MARGIN).choose(["big"])
    assert candidate is not None
    assert candidate.decision is not None
    assert candidate.decision.next_usd(candidate.target) == pytest.approx(0.0072)


TOOL_RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "sunny"}
REMINDER = {"type": "text", "text": "a reminder"}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (chat(), False),
        (ChatCall({"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "sunny"}]}), True),
        (ChatCall({"messages": [{"role": "tool", "content": "sunny"}, {"role": "user", "content": "hi"}]}), False),
        (MessagesCall({"messages": [{"role": "user", "content": "hi"}]}), False),
        (MessagesCall({"messages": [CALLED, {"role": "user", "content": [TOOL_RESULT]}]}), True),
        (MessagesCall({"messages": [CALLED, {"role": "user", "content": [TOOL_RESULT, REMINDER]}]}), True),
        (ResponsesCall({"input": "hi"}), False),
        (ResponsesCall({"input": [{"role": "user", "content": "hi"}]}), False),
        (ResponsesCall({"input": [{"type": "function_call_output", "call_id": "c", "output": "sunny"}]}), True),
        (ResponsesCall({"input": [{"type": "custom_tool_call_output", "call_id": "c", "output": "sunny"}]}), True),
    ],
)
def test_a_call_is_amid_tools_if_its_last_message_has_their_results(call: Call, expected: bool) -> None:
    assert call.carries_results is expected
