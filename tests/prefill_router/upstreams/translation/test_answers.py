"""Answers from either API to the other, whole and as streams of events."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from mutations import mutated
from prefill_router.upstreams.translation.answer_streams import ChatStream, MessagesStream
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_router.upstreams.translation.whole_answers import chat_answer, messages_answer

TEXT = 'Straße 漢字 🎉 \\ " \u2028 \ud83d'
USAGE = {
    "input_tokens": 3,
    "cache_creation_input_tokens": 4,
    "cache_read_input_tokens": 5,
    "output_tokens": 6,
}
CALL = {"type": "tool_use", "id": "t", "name": "f", "input": {"city": TEXT, "big": 2**70}}
MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": TEXT}, CALL],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": USAGE,
}


def data(events: Sequence[bytes]) -> list[Any]:
    lines = [line for event in events for line in event.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line[6:]) if line != b"data: [DONE]" else "[DONE]" for line in lines]


def translated(stream: Any, events: Sequence[Any]) -> list[Any]:
    given = [event if isinstance(event, bytes) else json.dumps(event).encode() for event in events]
    return data([each for event in given for each in stream(event)])


# --- whole ---------------------------------------------------------------------------------------------------------


def test_a_message_becomes_a_chat_completion_and_returns() -> None:
    chat = chat_answer(MESSAGE)
    (choice,) = chat["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == TEXT
    assert chat["usage"] == {
        "prompt_tokens": 12,
        "completion_tokens": 6,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 4},
    }
    assert messages_answer(chat) == MESSAGE


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("stop_sequence", "stop"),
        ("model_context_window_exceeded", "length"),
        ("unheard_of", "stop"),
        (None, "stop"),
        ([], "stop"),
    ],
)
def test_stop_reasons_correspond(stop: Any, finish: str) -> None:
    content = [{"type": "text", "text": "x"}]
    chat = chat_answer({**MESSAGE, "content": content, "stop_reason": stop})
    assert chat["choices"][0]["finish_reason"] == finish
    back = messages_answer(chat)["stop_reason"]
    assert back == {"length": "max_tokens", "content_filter": "refusal"}.get(finish, "end_turn")


def test_calls_that_end_with_stop_are_tool_use() -> None:
    chat = chat_answer(MESSAGE)
    chat["choices"][0]["finish_reason"] = "stop"
    assert messages_answer(chat)["stop_reason"] == "tool_use"


def test_an_answer_without_usage_reports_none() -> None:
    assert chat_answer({**MESSAGE, "usage": None})["usage"] is None
    assert messages_answer({"choices": [{"message": {"content": "x"}}]})["usage"]["output_tokens"] == 0


def test_thinking_is_reasoning_content() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    message = chat_answer({**MESSAGE, "content": [thinking, CALL]})["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", None)


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"tool_calls": [{"function": {}}]}}]}],
)
def test_a_chat_without_an_answer_is_refused(answer: Any) -> None:
    with pytest.raises(Untranslatable):
        messages_answer(answer)


@pytest.mark.parametrize("content", [None, "x", [{"type": "server_tool_use"}], [{"type": "text"}]])
def test_a_message_without_an_answer_is_refused(content: Any) -> None:
    with pytest.raises(Untranslatable):
        chat_answer({**MESSAGE, "content": content})


# --- streams -------------------------------------------------------------------------------------------------------


def block(index: int, begun: Any, *deltas: Any) -> list[Any]:
    return [
        {"type": "content_block_start", "index": index, "content_block": begun},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def of_json(*pieces: str) -> list[Any]:
    return [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]


def a_call(name: str) -> Any:
    return {"type": "tool_use", "id": f"t-{name}", "name": name, "input": {}}


EVENTS: list[Any] = [
    {"type": "message_start", "message": {**MESSAGE, "content": [], "usage": {**USAGE, "output_tokens": 1}}},
    {"type": "ping"},
    *block(0, {"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": "hm"}),
    *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": TEXT}, {"type": "text_delta", "text": "!"}),
    *block(2, a_call("f"), *of_json("", '{"city": "', 'Stra\\u00dfe ß"}')),
    *block(3, a_call("g")),
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use"},
        "usage": {"output_tokens": 6, "input_tokens": None},
    },
    {"type": "message_stop"},
]


def chunk(delta: Any, finish: str | None = None, **fields: Any) -> Any:
    return {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}


def call(index: int, arguments: str, name: str | None = None) -> Any:
    named = {"id": f"t-{name}", "type": "function"} if name else {}
    function = {**({"name": name} if name else {}), "arguments": arguments}
    return chunk({"tool_calls": [{"index": index, **named, "function": function}]})


def test_the_events_of_a_message_become_chunks() -> None:
    *chunks, usage, done = translated(ChatStream(has_usage=True), EVENTS)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == chat_answer(MESSAGE)["usage"]
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == f"{TEXT}!"
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
    calls = [each for delta in deltas for each in delta.get("tool_calls", [])]
    arguments = {0: "", 1: ""}
    for each in calls:
        arguments[each["index"]] += each["function"]["arguments"]
    assert arguments == {0: '{"city": "Stra\\u00dfe ß"}', 1: "{}"}
    assert [(each["id"], each["function"]["name"]) for each in calls if "id" in each] == [("t-f", "f"), ("t-g", "g")]
    assert [each["choices"][0]["finish_reason"] for each in chunks if each["choices"][0]["finish_reason"]] == [
        "tool_calls"
    ]


def test_the_usage_is_sent_only_if_it_was_asked_for() -> None:
    *chunks, _done = translated(ChatStream(has_usage=False), EVENTS)
    assert all(each["choices"] for each in chunks)


def test_chunks_become_the_events_of_a_message() -> None:
    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": TEXT}),
        chunk({"content": "!"}),
        call(0, "", "f"),
        call(0, '{"city": "'),
        call(0, 'Stra\\u00dfe ß"}'),
        call(1, "{}", "g"),
        chunk({}, "tool_calls"),
        {"id": "c", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}},
        b"[DONE]",
    ]
    events = translated(MessagesStream(), chunks)
    assert [event["type"] for event in events] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    pieces: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            pieces[event["index"]] = pieces.get(event["index"], "") + (delta.get("text") or delta["partial_json"])
    assert pieces == {0: f"{TEXT}!", 1: '{"city": "Stra\\u00dfe ß"}', 2: "{}"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"] == {**dict.fromkeys(USAGE, 0), "input_tokens": 9, "output_tokens": 6}


def test_text_after_a_call_is_another_block() -> None:
    chunks = [chunk({"content": "a"}), call(0, "{}", "f"), chunk({"content": "b"}, "stop"), b"[DONE]"]
    begun = [event for event in translated(MessagesStream(), chunks) if event["type"] == "content_block_start"]
    assert [(event["index"], event["content_block"]["type"]) for event in begun] == [
        (0, "text"),
        (1, "tool_use"),
        (2, "text"),
    ]


def test_interleaved_calls_are_refused() -> None:
    stream = MessagesStream()
    with pytest.raises(Untranslatable, match="interleaved"):
        translated(stream, [call(0, "{", "f"), call(1, "{", "g"), call(0, "}")])


@pytest.mark.parametrize(
    ("make", "seeds"),
    [(lambda: ChatStream(has_usage=True), EVENTS), (MessagesStream, [chunk({"content": "a"}), call(0, "{}", "f")])],
)
def test_damaged_events_are_translated_or_refused(make: Any, seeds: Any) -> None:
    rng = random.Random(0)
    for _ in range(500):
        stream = make()
        try:
            for seed in seeds:
                stream(json.dumps(mutated(seed, rng)).encode())
        except Untranslatable:
            continue
