"""Translates streams of events, one event at a time. Each translator holds the state of one answer."""

from __future__ import annotations

import json
from time import time
from typing import Any, Protocol

from prefill_router.upstreams.translation.untranslatable import Body, Untranslatable, a_string, written_arguments
from prefill_router.upstreams.translation.whole_answers import (
    chat_usage,
    finish_reason,
    message_head,
    messages_usage,
    stop_reason,
)

_DONE = b"[DONE]"
_DELTAS = {"text_delta": ("text", "content"), "thinking_delta": ("thinking", "reasoning_content")}
_SILENT_DELTAS = ("signature_delta", "citations_delta")


class StreamTranslator(Protocol):
    """Translates the data of one event to events, each with its final blank line. Raises Untranslatable."""

    def __call__(self, data: bytes) -> list[bytes]: ...


class ChatStream:
    """From events of a message to chunks of a chat completion."""

    def __init__(self, *, has_usage: bool) -> None:
        """`has_usage`: the caller asked for a last chunk with the usage."""
        self._has_usage = has_usage
        self._head: Body = {"id": "", "object": "chat.completion.chunk", "created": int(time()), "model": ""}
        self._usage: Body = {}
        self._num_calls = 0
        self._arguments: int | None = None  # bytes so far of the open tool call

    def __call__(self, data: bytes) -> list[bytes]:
        event = _event_of(data)
        kind = event.get("type")
        if kind == "message_start":
            message = _object(event.get("message"))
            self._head |= {"id": message.get("id") or "", "model": message.get("model") or ""}
            self._usage |= _object(message.get("usage"))
            return [self._chunk({"role": "assistant", "content": "", "refusal": None})]
        if kind == "content_block_start":
            return self._begin(_object(event.get("content_block")))
        if kind == "content_block_delta":
            return self._extend(_object(event.get("delta")))
        if kind == "content_block_stop":
            return self._end_block()
        if kind == "message_delta":
            self._usage |= {name: given for name, given in _object(event.get("usage")).items() if given is not None}
            reason = _object(event.get("delta")).get("stop_reason")
            return [] if reason is None else [self._chunk({}, finish_reason(reason))]
        return self._end() if kind == "message_stop" else []

    def _begin(self, block: Body) -> list[bytes]:
        kind = block.get("type")
        if kind == "text":
            return [self._chunk({"content": block["text"]})] if block.get("text") else []
        if kind in ("thinking", "redacted_thinking"):
            return []
        if kind != "tool_use":
            raise Untranslatable(f"content: a block of type {kind}")
        arguments = written_arguments(block["input"], "content.input") if block.get("input") else ""
        self._arguments, self._num_calls = len(arguments), self._num_calls + 1
        function = {"name": block.get("name"), "arguments": arguments}
        return [self._call({"id": block.get("id"), "type": "function", "function": function})]

    def _extend(self, delta: Body) -> list[bytes]:
        kind = delta.get("type")
        if kind == "input_json_delta" and self._arguments is not None:
            piece = a_string(delta.get("partial_json"), "delta.partial_json")
            self._arguments += len(piece)
            return [self._call({"function": {"arguments": piece}})] if piece else []
        if kind in _SILENT_DELTAS:
            return []
        if str(kind) not in _DELTAS:
            raise Untranslatable(f"delta: of type {kind}")
        name, chat_name = _DELTAS[str(kind)]
        return [self._chunk({chat_name: delta.get(name)})]

    def _end_block(self) -> list[bytes]:
        """A tool call without arguments has an empty object in a chat completion."""
        is_empty, self._arguments = self._arguments == 0, None
        return [self._call({"function": {"arguments": "{}"}})] if is_empty else []

    def _end(self) -> list[bytes]:
        usage = chat_usage(self._usage) if self._has_usage else None
        last = [] if usage is None else [_chat_event({**self._head, "choices": [], "usage": usage})]
        return [*last, b"data: %b\n\n" % _DONE]

    def _call(self, call: Body) -> bytes:
        return self._chunk({"tool_calls": [{"index": self._num_calls - 1, **call}]})

    def _chunk(self, delta: Body, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _chat_event({**self._head, "choices": [choice]})


class MessagesStream:
    """From chunks of a chat completion to events of a message. A chunk's tool call ends the block before it."""

    def __init__(self) -> None:
        self._has_begun = False
        self._index = -1  # of the last block
        self._open: str | int | None = None  # "text", or the number of a tool call
        self._calls: set[int] = set()
        self._reason: Any = None
        self._usage: Any = None

    def __call__(self, data: bytes) -> list[bytes]:
        if data.strip() == _DONE:
            return self._end()
        chunk = _event_of(data)
        events = [] if self._has_begun else [self._start(chunk)]
        self._usage = chunk.get("usage") or self._usage
        for choice in _objects(chunk.get("choices"))[:1]:
            delta = _object(choice.get("delta"))
            for text in (delta.get("content"), delta.get("refusal")):
                events += self._text(a_string(text, "delta.content")) if text else []
            for call in _objects(delta.get("tool_calls")):
                events += self._tool_call(call)
            self._reason = choice.get("finish_reason") or self._reason
        return events

    def _start(self, chunk: Body) -> bytes:
        self._has_begun = True
        empty: Body = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": messages_usage(None)}
        return _message_event("message_start", message={**message_head(chunk), **empty})

    def _text(self, text: str) -> list[bytes]:
        begin = [] if self._open == "text" else self._begin("text", {"type": "text", "text": ""})
        return [*begin, self._delta({"type": "text_delta", "text": text})]

    def _tool_call(self, call: Body) -> list[bytes]:
        number, function = call.get("index", 0), _object(call.get("function"))
        if not isinstance(number, int):
            raise Untranslatable("tool_calls.index: not an integer")
        events: list[bytes] = []
        if number not in self._calls:
            self._calls.add(number)
            named: Body = {"id": call.get("id"), "name": function.get("name"), "input": {}}
            events = self._begin(number, {"type": "tool_use", **named})
        if piece := function.get("arguments"):
            if number != self._open:
                raise Untranslatable("tool_calls: interleaved")
            events.append(self._delta({"type": "input_json_delta", "partial_json": a_string(piece, "arguments")}))
        return events

    def _begin(self, what: str | int, block: Body) -> list[bytes]:
        ended = self._end_block()
        self._open, self._index = what, self._index + 1
        return [*ended, _message_event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: Body) -> bytes:
        return _message_event("content_block_delta", index=self._index, delta=delta)

    def _end_block(self) -> list[bytes]:
        is_open, self._open = self._open is not None, None
        return [_message_event("content_block_stop", index=self._index)] if is_open else []

    def _end(self) -> list[bytes]:
        ended = {"stop_reason": stop_reason(self._reason, called=bool(self._calls)), "stop_sequence": None}
        last = _message_event("message_delta", delta=ended, usage=messages_usage(self._usage))
        return [*self._end_block(), last, _message_event("message_stop")]


def _event_of(data: bytes) -> Body:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise Untranslatable("an event: not JSON") from None
    return _object(event)


def _object(given: Any) -> Body:
    return given if isinstance(given, dict) else {}


def _objects(given: Any) -> list[Body]:
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def _chat_event(chunk: Body) -> bytes:
    return b"data: %b\n\n" % json.dumps(chunk).encode()


def _message_event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())
