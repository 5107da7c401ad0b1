"""Calls of Anthropic's Messages API."""

from __future__ import annotations

import json
import re
from collections.abc import Set
from functools import cached_property
from typing import Any

from prefill_serve.gateway.events import data_of
from prefill_serve.gateway.openai_calls import (
    JSON_STRING,
    NO_MESSAGE,
    Body,
    Call,
    Needs,
    Note,
    encoded,
    image_parts,
    json_object,
    require_objects,
)
from prefill_serve.gateway.upstream_errors import error_message
from prefill_serve.http_errors import error_body, messages_error
from prefill_serve.provider_messages import is_result

# Events without a match, which are most, need no parsing.
_NOTED_IN_MESSAGES = re.compile(rb'"(message_start|message_delta|message_stop|error)"')
_TEXT_IN_MESSAGES = re.compile(rb'"(?:text|thinking|partial_json)' + JSON_STRING)


class MessagesCall(Call):
    """POST /v1/messages."""

    protocol = "anthropic"
    path = "/messages"
    limit_fields = ("max_tokens",)

    @cached_property
    def messages(self) -> list[Body]:
        system = self.body.get("system")
        before = [{"role": "system", "content": _without_cache_control(system)}] if system else []
        given = require_objects(self.body.get("messages"), "messages")
        return [*before, *(each for message in given for each in _split(message))]

    @cached_property
    def needs(self) -> Needs:
        reserved = self.body.get("max_tokens")
        has_images = bool(image_parts([message.get("content") for message in self.messages]))
        return Needs(bool(self.body.get("tools")), has_images, reserved if isinstance(reserved, int) else 0)

    @property
    def carries_results(self) -> bool:
        content = self.body["messages"][-1].get("content")
        return isinstance(content, list) and any(is_result(part) for part in content)

    def text_bytes(self, event: bytes) -> int:
        return sum(map(len, _TEXT_IN_MESSAGES.findall(event)))

    def answer_bytes(self, answer: Body) -> int:
        blocks = answer.get("content")
        inputs = [block.get("input") for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
        return self.text_bytes(encoded(answer)) + sum(len(encoded(given)) for given in inputs if given)

    def answer_id(self, answer: Body) -> str | None:  # noqa: ARG002 - messages cannot be continued
        return None

    def note(self, event: bytes) -> Note | None:
        if not _NOTED_IN_MESSAGES.search(event):
            return None
        body = json_object(data_of(event))
        kind = body.get("type")
        if kind == "message_start":
            message = body.get("message")
            return Note(begun_usage=self.usage(message) if isinstance(message, dict) else None)
        if kind == "message_delta":
            delta, given = body.get("delta"), body.get("usage")
            usage = self.usage({"usage": {"input_tokens": 0, **_given(given)}}) if isinstance(given, dict) else None
            is_end = isinstance(delta, dict) and delta.get("stop_reason") is not None
            return Note(usage, ended=frozenset({0}) if is_end else frozenset())
        if kind == "message_stop":
            return Note(is_last=True)
        return Note(error=error_message(body) or NO_MESSAGE) if kind == "error" else Note(error=self.error(body))

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:  # noqa: ARG002 - a message is one answer
        """message_stop is not enough: the answer must have a stop reason."""
        return bool(ended)

    def error_event(self, message: str, code: str) -> bytes:
        error = messages_error(502, error_body(502, message, code))
        return b"event: error\ndata: %b\n\n" % json.dumps(error).encode()

    def refusal(self, status: int, content: bytes) -> bytes:
        return json.dumps(messages_error(status, json_object(content))).encode()


class TokenCountCall(MessagesCall):
    """POST /v1/messages/count_tokens."""

    path = "/messages/count_tokens"


def _split(message: Body) -> list[Body]:
    """A message as those of a chat: the results of tools, then the rest."""
    content, role = message.get("content"), message.get("role")
    if not isinstance(content, list):
        return [message]
    results = [part for part in content if is_result(part)]
    rest = [part for part in content if not is_result(part)]
    said = [{"role": "tool", "content": _without_cache_control(result.get("content"))} for result in results]
    return [*said, *([{"role": role, "content": _without_cache_control(rest)}] if rest or not results else [])]


def _without_cache_control(content: Any) -> Any:
    """The content alone: clients move their cache breakpoints, and the conversation must still be recognised."""
    if not isinstance(content, list):
        return content
    return [
        {name: value for name, value in part.items() if name != "cache_control"} if isinstance(part, dict) else part
        for part in content
    ]


def _given(fields: Body) -> Body:
    return {name: value for name, value in fields.items() if value is not None}
