"""The server side of Anthropic's Messages: parses requests, and builds bodies and events of answers and errors.

Fields follow Anthropic's API reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from openai_protocol import Answer, BadRequest, Event, Json, Prompt, Reply, Usage


def read_messages(body: Json) -> Prompt:
    """Raises BadRequest, as Anthropic does for a missing limit and for messages whose roles do not alternate."""
    for name in ("model", "messages", "max_tokens"):
        if name not in body:
            raise BadRequest(f"{name}: Field required", name)
    messages = [("system", _text(body["system"]))] if body.get("system") else []
    for message in body["messages"]:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if any(block["type"] == "text" and not block["text"] for block in blocks):
            raise BadRequest("messages: text content blocks must be non-empty", "messages")
        results = [block for block in blocks if block["type"] == "tool_result"]
        messages += [("tool", _text(result.get("content") or "")) for result in results]
        rest = [block for block in blocks if block["type"] != "tool_result"]
        if rest:
            messages.append((message["role"], _text(rest)))
    tools = {tool["name"]: tool["input_schema"] for tool in body.get("tools") or ()}
    choice = body.get("tool_choice") or {"type": "auto"}
    first = next(iter(tools), None)
    return Prompt(
        model=body["model"],
        messages=tuple(messages),
        stream=bool(body.get("stream")),
        include_usage=True,
        tools={} if choice["type"] == "none" else tools,
        must_call={"any": first, "tool": choice.get("name")}.get(choice["type"]),
        schema=None,
        max_tokens=body["max_tokens"],
    )


def messages_error(body: Json) -> Json:
    """An error of OpenAI's as Anthropic's."""
    error = body["error"]
    message = error["message"]
    if error["code"] == "context_length_exceeded":
        message = f"prompt is too long: 9 tokens > 8 maximum. {message}"
    return {"type": "error", "error": {"type": error["type"] or "api_error", "message": message}}


class MessagesReply(Reply):
    """POST /v1/messages."""

    def body(self) -> Json:
        return {
            **self._head(),
            "content": [self._block(number) for number in range(len(self._answer.calls) or 1)],
            "stop_reason": self._stop_reason,
            "usage": _usage(self.usage),
        }

    def events(self) -> Iterator[Event]:
        begun = _usage(Usage(self.usage.prompt_tokens, self.usage.cached_tokens, 1))
        yield _event("message_start", message={**self._head(), "content": [], "stop_reason": None, "usage": begun})
        yield _event("ping")
        for number in range(len(self._answer.calls) or 1):
            yield from self._block_events(number)
        usage = {"output_tokens": self.usage.completion_tokens}  # the input tokens came at the start
        yield _event("message_delta", delta={"stop_reason": self._stop_reason, "stop_sequence": None}, usage=usage)
        yield _event("message_stop")

    def error(self, body: Json, _place: int, /) -> Event:
        return Event(messages_error(body), name="error")

    @property
    def _answer(self) -> Answer:
        return self.answers[0]

    @property
    def _stop_reason(self) -> str:
        return "tool_use" if self._answer.calls else "max_tokens" if self._answer.is_cut else "end_turn"

    def _head(self) -> Json:
        head = {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "model": self.model}
        return {**head, "stop_sequence": None}

    def _block(self, number: int) -> Json:
        if not self._answer.calls:
            return {"type": "text", "text": self._answer.text}
        name, arguments = self._answer.calls[number]
        return {**self._called(number, name), "input": json.loads("".join(arguments))}

    def _called(self, number: int, name: str) -> Json:
        return {"type": "tool_use", "id": f"toolu_{self.id}_{number}", "name": name, "input": {}}

    def _block_events(self, number: int) -> Iterator[Event]:
        begun: Json = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": piece} for piece in self._answer.pieces]
        if self._answer.calls:
            name, arguments = self._answer.calls[number]
            begun = self._called(number, name)
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in arguments]
        yield _event("content_block_start", index=number, content_block=begun)
        for delta in deltas:
            yield _event("content_block_delta", 1, index=number, delta=delta)
        yield _event("content_block_stop", index=number)


def _usage(usage: Usage) -> Json:
    """A third of the uncached tokens is written to the cache, so that the three kinds of input add up."""
    uncached = usage.prompt_tokens - usage.cached_tokens
    written = uncached // 3
    return {
        "input_tokens": uncached - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _event(name: str, num_tokens: int = 0, /, **fields: Any) -> Event:
    return Event({"type": name, **fields}, num_tokens, name)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in content if block["type"] == "text")
