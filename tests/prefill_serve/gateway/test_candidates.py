"""Targets that can take a call, and their default order."""

from __future__ import annotations

from typing import Any

import pytest

from prefill_router.policy.pool import Target, Upstream
from prefill_serve.gateway.candidates import Candidate, FixedPlan, can_take, default_order, estimated_tokens
from prefill_serve.gateway.chat_calls import ChatCall
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
