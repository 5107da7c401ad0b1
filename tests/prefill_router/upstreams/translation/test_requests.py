"""Requests from either API to the other: what is kept, what is dropped by name, and what has no translation."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from mutations import mutated
from prefill_router.upstreams.translation.chat_requests import chat_request
from prefill_router.upstreams.translation.messages_requests import messages_request
from prefill_router.upstreams.translation.untranslatable import Untranslatable

TEXT = 'Straße 漢字 🎉 \\ " \u2028 \ud83d'
USER: Any = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": TEXT},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}},
                {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": TEXT},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
        {"role": "user", "content": "and now?"},
    ],
    "max_tokens": 100,
    "temperature": 0.5,
    "top_p": 0.9,
    "stream": True,
    "stop": ["a", "b"],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "w", "parameters": SCHEMA}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "system": [{"type": "text", "text": "be brief"}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": TEXT},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "let me see"},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "call_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": TEXT},
                {"type": "tool_result", "tool_use_id": "call_2", "content": ""},
                {"type": "text", "text": "and now?"},
            ],
        },
    ],
    "max_tokens": 100,
    "temperature": 0.5,
    "top_p": 0.9,
    "stream": True,
    "stop_sequences": ["a", "b"],
    "tools": [{"name": "weather", "description": "w", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}


def test_either_request_is_the_translation_of_the_other() -> None:
    assert messages_request(copy.deepcopy(CHAT)) == (MESSAGES, [])
    assert chat_request(copy.deepcopy(MESSAGES)) == (CHAT, [])


@pytest.mark.parametrize(
    ("choice", "translated"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
    ],
)
def test_tool_choices_correspond(choice: Any, translated: Any) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    request = messages_request({"messages": [USER], "tools": [tool], "tool_choice": choice}).body
    assert request["tool_choice"] == translated
    assert chat_request({"messages": [USER], "tool_choice": translated}).body["tool_choice"] == choice


def test_parallel_calls_are_disabled_without_a_choice() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    request = messages_request({"messages": [USER], "tools": [tool], "parallel_tool_calls": False}).body
    assert request["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    assert request["tools"] == [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
        {"logit_bias": {"1": 2}},
        {"modalities": ["text", "audio"]},
        {"temperature": 1.5},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "custom", "custom": {}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "allowed_tools"}},
        {"messages": [USER, {"role": "system", "content": "later"}]},
        {"messages": [USER, {"role": "assistant", "content": "begun"}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///a"}}]}]},
        {"messages": [{"role": "function", "content": "x"}]},
        {"messages": [{"role": "tool", "tool_call_id": "functions.f:0", "content": "x"}]},
        {"messages": "hello"},
        {"messages": [7]},
    ],
)
def test_a_chat_that_messages_cannot_express(fields: Any) -> None:
    with pytest.raises(Untranslatable):
        messages_request({"messages": [USER], **fields})


@pytest.mark.parametrize("arguments", ["{", "[]", '{"a": NaN}', '{"a": -1e999}', None])
def test_arguments_that_are_no_object(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(Untranslatable, match=r"tool_calls\.arguments"):
        messages_request({"messages": [{"role": "assistant", "tool_calls": [call]}, USER]})


def _block(**block: Any) -> Any:
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"container": "c"},
        {"mcp_servers": [{}]},
        {"stop_sequences": list("abcde")},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "n" * 65, "input_schema": {}}]},
        {"tool_choice": {"type": "some"}},
        {"output_config": {"format": {"type": "grammar"}}},
        _block(type="document", source={}),
        _block(type="image", source={"type": "file", "file_id": "f"}),
        _block(type="tool_result", tool_use_id="t", content=[{"type": "image", "source": {}}]),
        {"messages": [USER, {"role": "assistant", "content": "begun"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}, USER]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"a": 1e999}}]}, USER]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
    ],
)
def test_a_message_that_chats_cannot_express(fields: Any) -> None:
    with pytest.raises(Untranslatable):
        chat_request({"messages": [USER], **fields})


def test_fields_of_a_chat_that_messages_lack_are_named() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}}
    said = [{"role": "user", "content": [image], "name": "ann"}, {**USER, "annotations": []}]
    request = messages_request(
        {"messages": said, "seed": 7, "reasoning_effort": "low", "user": None, "logprobs": False, "store": False}
    )
    assert request.dropped == ["messages.name", "image_url.detail", "seed", "reasoning_effort"]


def test_fields_of_a_message_that_chats_lack_are_named() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    answer = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "hi"}]
    result = {"type": "tool_result", "tool_use_id": "t", "content": "no", "is_error": True}
    request = chat_request(
        {
            "system": [{"type": "text", "text": "s", **cached}],
            "messages": [USER, {"role": "assistant", "content": answer}, {"role": "user", "content": [result]}],
            "thinking": {"type": "enabled"},
            "metadata": {"user_id": "u"},
            "output_config": {"effort": "low"},
            "tools": [{"name": "f", "input_schema": {}, **cached}],
        }
    )
    assert request.body["messages"][2] == {"role": "assistant", "content": "hi"}
    assert request.dropped == [
        *("cache_control", "thinking", "tool_result.is_error", "tools.cache_control", "output_config.effort"),
        "metadata",
    ]


@pytest.mark.parametrize(("translate", "seed"), [(messages_request, CHAT), (chat_request, MESSAGES)])
def test_damaged_requests_are_translated_or_refused(translate: Any, seed: Any) -> None:
    rng = random.Random(0)
    outcomes = set()
    for _ in range(2_000):
        damaged = mutated(seed, rng)
        if not isinstance(damaged, dict):
            continue
        try:
            translate(damaged)
            outcomes.add("translated")
        except Untranslatable:
            outcomes.add("refused")
    assert outcomes == {"translated", "refused"}
