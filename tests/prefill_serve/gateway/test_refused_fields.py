"""Fields that a target was seen to refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefill_router.policy.pool import Target, Upstream
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.refusals import RefusalReason
from prefill_serve.gateway.refused_fields import RefusedFields, is_adaptable, is_hint

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TARGET = Target(name="t", input_price=1.0, output_price=1.0, upstream=Upstream(base_url="http://127.0.0.1/v1"))
TEMPERATURE = RefusalReason("parameter", "temperature")
RENAMED = RefusalReason("parameter", "max_tokens", "max_completion_tokens")


def chat(**fields: Any) -> ChatCall:
    return ChatCall({"messages": HELLO, **fields})


def after(*reasons: RefusalReason, call: ChatCall | None = None) -> RefusedFields:
    refused = RefusedFields(lambda: 0.0)
    for reason in reasons:
        refused.learn(reason, call or chat())
    return refused


def sent(refused: RefusedFields, call: ChatCall, target: Target = TARGET) -> Any:
    return json.loads(call.for_upstream(refused.adapted(target, call)))


def test_nothing_is_left_out_before_a_refusal() -> None:
    assert RefusedFields().adapted(TARGET, chat(temperature=0.5)) is TARGET
    assert RefusedFields().left_out(chat(temperature=0.5)) == []


def test_a_hint_is_left_out_and_said() -> None:
    call = chat(temperature=0.5, seed=1)
    refused = after(TEMPERATURE)
    assert sent(refused, call) == {"model": "t", "messages": HELLO, "seed": 1}
    assert refused.left_out(call) == ["temperature"]
    assert refused.left_out(chat(seed=1)) == []
    assert not refused.are_needed(call)


def test_a_limit_is_renamed_the_gateways_too() -> None:
    refused = after(RENAMED)
    assert sent(refused, chat(max_tokens=9)) == {"model": "t", "messages": HELLO, "max_completion_tokens": 9}
    limited = ChatCall({"messages": HELLO}, answer_tokens=7)
    assert sent(refused, limited)["max_completion_tokens"] == 7
    assert refused.left_out(chat(max_tokens=9)) == []


def test_the_gateways_own_stream_options_are_left_out() -> None:
    refused = after(RefusalReason("parameter", "stream_options"))
    assert "stream_options" not in sent(refused, chat(stream=True))
    assert refused.left_out(chat(stream=True)) == []


@pytest.mark.parametrize("instead", ["max_output_tokens", "messages", None])
def test_a_limit_is_never_left_out_nor_renamed_to_anything(instead: str | None) -> None:
    refused = after(RefusalReason("parameter", "max_tokens", instead))
    call = chat(max_tokens=9)
    assert sent(refused, call)["max_tokens"] == 9
    assert refused.are_needed(call)


def test_what_the_pool_says_still_holds() -> None:
    upstream = Upstream(base_url="http://127.0.0.1/v1", drop=("seed",), rename={"user": "safety_identifier"})
    target = TARGET.model_copy(update={"upstream": upstream})
    call = chat(temperature=0.5, seed=1, user="ann", max_tokens=9)
    expected = {"model": "t", "messages": HELLO, "safety_identifier": "ann", "max_completion_tokens": 9}
    assert sent(after(TEMPERATURE, RENAMED), call, target) == expected


def test_a_value_that_was_refused_is_left_out_and_others_are_not() -> None:
    refused = after(
        RefusalReason("parameter", "reasoning_effort", is_about_value=True), call=chat(reasoning_effort="minimal")
    )
    assert "reasoning_effort" not in sent(refused, chat(reasoning_effort="minimal"))
    assert sent(refused, chat(reasoning_effort="high"))["reasoning_effort"] == "high"


@pytest.mark.parametrize(
    ("reason", "call", "other"),
    [
        (RefusalReason("content", "tools"), chat(tools=[{"type": "function"}]), chat(temperature=1)),
        (RefusalReason("content", "images"), chat(messages=[{"role": "user", "content": [IMAGE]}]), chat()),
        (RefusalReason("parameter", "response_format"), chat(response_format={"type": "json_object"}), chat()),
    ],
)
def test_what_a_call_needs_is_not_left_out(reason: RefusalReason, call: ChatCall, other: ChatCall) -> None:
    refused = after(reason)
    assert refused.are_needed(call)
    assert not refused.are_needed(other)
    assert sent(refused, call) == sent(RefusedFields(), call)
    assert not is_adaptable(reason)


def test_nothing_is_learnt_from_other_refusals() -> None:
    for reason in (
        RefusalReason("too_long", "messages"),
        RefusalReason("request", "temperature"),
        RefusalReason("content"),
    ):
        assert not RefusedFields().learn(reason, chat())
        assert not is_adaptable(reason)
    assert after(RefusalReason("request", "temperature")).left_out(chat(temperature=1)) == []


def test_a_refusal_is_new_once_and_forgotten_after_an_hour() -> None:
    now = 0.0
    refused = RefusedFields(lambda: now)
    call = chat(temperature=0.5)
    assert refused.learn(TEMPERATURE, call)
    now = 3000.0
    assert not refused.learn(TEMPERATURE, call)
    now = 6000.0
    assert refused.left_out(call) == ["temperature"]
    now = 6600.0
    assert refused.left_out(call) == []
    assert refused.learn(TEMPERATURE, call)


def test_what_is_remembered_is_bounded() -> None:
    refused = RefusedFields(lambda: 0.0)
    for number in range(1000):
        refused.learn(RefusalReason("parameter", "seed", is_about_value=True), chat(seed=number))
    assert len(refused._facts) == 64
    assert refused.left_out(chat(seed=999)) == ["seed"]


@pytest.mark.parametrize(
    ("reason", "adaptable", "hint"),
    [
        (TEMPERATURE, True, True),
        (RENAMED, True, False),
        (RefusalReason("parameter", "stream_options"), True, False),
        (RefusalReason("parameter", "stop"), False, False),
        (RefusalReason("parameter"), False, False),
    ],
)
def test_a_hint_changes_the_answer_and_a_name_does_not(reason: RefusalReason, adaptable: bool, hint: bool) -> None:
    assert (is_adaptable(reason), is_hint(reason)) == (adaptable, hint)
