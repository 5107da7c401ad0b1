"""What the gateway reads from messages of Anthropic's API and from their answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefill_router.policy.pool import Target, Upstream
from prefill_serve.gateway.call_record import Usage
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.conversation_keys import thread_of
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import Needs, Note
from prefill_serve.gateway.translated_calls import translated

UPSTREAM = Upstream(base_url="http://127.0.0.1/v1", limit_field="max_completion_tokens")
TARGET = Target(name="t", input_price=1.0, output_price=1.0, upstream=UPSTREAM)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
USAGE = {"input_tokens": 3, "cache_creation_input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 6}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 10_000}}


def messages(**fields: Any) -> MessagesCall:
    return MessagesCall({"model": "auto", "max_tokens": 9, "messages": HELLO, **fields})


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


def test_the_conversation_is_read_as_a_chat() -> None:
    marked = {"type": "text", "text": "see", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "4 m"}, IMAGE]}
    call = messages(system="be brief", messages=[*HELLO, {"role": "user", "content": [result, marked]}], tools=[{}])
    assert call.messages == [
        {"role": "system", "content": "be brief"},
        *HELLO,
        {"role": "tool", "content": result["content"]},
        {"role": "user", "content": [{"type": "text", "text": "see"}]},
    ]
    assert call.needs == Needs(tools=True, images=True, output_tokens=9)
    assert call.most_input_tokens() < 3000  # the image counts as a fixed number
    prompt: Any = call.question.question_of(100).prompt
    assert [message["content"] for message in prompt] == ["be brief", "hello", "4 m", "see"]


def test_moved_cache_breakpoints_leave_the_conversations_key() -> None:
    def asked(**marks: Any) -> MessagesCall:
        said = [{"role": "user", "content": [{"type": "text", "text": "a", **marks}]}]
        return messages(system=[{"type": "text", "text": "s", **marks}], messages=said)

    assert thread_of(asked(cache_control={"type": "ephemeral"}), "ann", None) == thread_of(asked(), "ann", None)


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        (USAGE, Usage(12, 6, 5, 4)),
        ({"input_tokens": 3, "output_tokens": 6}, Usage(3, 6, 0)),
        ({**USAGE, "cache_read_input_tokens": None}, Usage(7, 6, 0, 4)),
        ({**USAGE, "cache_creation_input_tokens": -4}, None),
        ({**USAGE, "output_tokens": "6"}, None),
        ({"output_tokens": 6}, None),
        (None, None),
    ],
)
def test_usage_counts_all_input(usage: Any, found: Usage | None) -> None:
    assert messages().usage({"usage": usage}) == found


def test_events_are_noted() -> None:
    call = messages()
    start = event("message_start", message={"usage": {**USAGE, "output_tokens": 1}})
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 6, "input_tokens": None})
    assert call.note(start) == Note(begun_usage=Usage(12, 1, 5, 4))
    assert call.note(end) == Note(Usage(0, 6, 0), ended=frozenset({0}))
    assert call.note(event("message_stop")) == Note(is_last=True)
    assert call.note(event("error", error={"type": "overloaded_error", "message": "busy"})) == Note(error="busy")
    assert call.note(event("ping")) is None
    assert call.is_whole(set(), {0})
    assert not call.is_whole(set(), set())


def test_the_length_of_an_answer_is_that_of_its_text_and_calls() -> None:
    call = messages()
    delta = event("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{}"})
    assert call.text_bytes(delta) == 2
    content = [{"type": "text", "text": "four"}, {"type": "tool_use", "input": {"a": 1}}]
    assert call.answer_bytes({"content": content}) == 4 + len('{"a": 1}')


def test_a_translated_call_keeps_its_limit() -> None:
    asked = translated(messages(), "openai").call
    assert json.loads(asked.for_upstream(TARGET)) == {
        "model": "t",
        "messages": HELLO,
        "max_completion_tokens": 9,
    }
    unlimited = translated(ChatCall({"messages": HELLO}), "anthropic").call
    assert json.loads(unlimited.for_upstream(TARGET))["max_tokens"] == 8192
    limited = translated(ChatCall({"messages": HELLO}, answer_tokens=7), "anthropic").call
    assert json.loads(limited.for_upstream(TARGET))["max_tokens"] == 7


def test_the_routers_fields_are_not_translated() -> None:
    asked = translated(messages(tolerance=0.1, models=["t"]), "openai")
    assert asked.dropped == []
    assert set(asked.call.body) == {"model", "messages"}
