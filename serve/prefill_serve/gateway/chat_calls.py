"""Calls of OpenAI's chat completions API."""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import replace
from functools import cached_property
from typing import Any

from prefill_router.policy.pool import Target, Upstream
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
    positive_int,
    require_objects,
)
from prefill_serve.gateway.upstream_errors import error_message
from prefill_serve.http_errors import error_body

# Events without a match, which are most, need no parsing.
_NOTED_IN_CHAT = re.compile(rb'"(usage"\s*:\s*\{|finish_reason"\s*:\s*"|error")|\[DONE\]|^event: ?error', re.M)
_ERROR_EVENT = re.compile(rb"^event: ?error\s*$", re.M)
_TEXT_IN_CHAT = re.compile(rb'"(?:content|refusal|reasoning|reasoning_content|arguments)' + JSON_STRING)


class ChatCall(Call):
    """POST /v1/chat/completions."""

    path = "/chat/completions"
    limit_fields = ("max_completion_tokens", "max_tokens")

    @cached_property
    def messages(self) -> list[Body]:
        return require_objects(self.body.get("messages"), "messages")

    @cached_property
    def needs(self) -> Needs:
        has_tools = any(self.body.get(name) for name in ("tools", "functions"))
        reserved = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        contents = [message.get("content") for message in self.messages]
        return Needs(has_tools, bool(image_parts(contents)), reserved if isinstance(reserved, int) else 0)

    @property
    def num_answers(self) -> int:
        return positive_int(self.body.get("n")) or 1

    def _limit_field(self, upstream: Upstream) -> str:
        return upstream.limit_field

    @property
    def wants_usage(self) -> bool:
        """Whether the caller of a stream asked for its usage."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def for_upstream(self, target: Target) -> bytes:
        if not self.is_stream or self.wants_usage:
            return super().for_upstream(target)
        options = self.body.get("stream_options")
        given = options if isinstance(options, dict) else {}
        body = {**self.body, "stream_options": {**given, "include_usage": True}}
        return replace(self, body=body).for_upstream(target)

    def text_bytes(self, event: bytes) -> int:
        return sum(map(len, _TEXT_IN_CHAT.findall(event)))

    def answer_bytes(self, answer: Body) -> int:
        return self.text_bytes(encoded(answer))

    def answer_id(self, answer: Body) -> str | None:  # noqa: ARG002 - chat completions cannot be continued
        return None

    def note(self, event: bytes) -> Note | None:
        has_many = self.body.get("n") not in (None, 1)
        if not has_many and not _NOTED_IN_CHAT.search(event):
            return None
        data = data_of(event)
        if data.strip() == b"[DONE]":
            return Note(is_last=True)
        body = json_object(data)
        usage, choices = self.usage(body), body.get("choices")
        is_for_caller = not isinstance(body.get("usage"), dict) or self.wants_usage or bool(choices)
        begun = _indices(choices) if has_many else frozenset[int]()
        ended = _indices(choices, "finish_reason")
        error = self.error(body)
        if error is None and _ERROR_EVENT.search(event):
            error = error_message(body) or NO_MESSAGE
        return Note(usage, error, is_for_caller=is_for_caller, begun=begun, ended=ended)

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:
        """[DONE] is not enough: some upstreams send it after an incomplete answer."""
        return bool(ended) and begun <= ended

    def error_event(self, message: str, code: str) -> bytes:
        return b"data: %b\n\n" % json.dumps(error_body(502, message, code)).encode()


def _indices(choices: Any, having: str | None = None) -> frozenset[int]:
    """Indices of a chunk's choices: all, or those with a non-empty field."""
    given = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    indices = [choice.get("index", 0) for choice in given if having is None or choice.get(having)]
    return frozenset(index for index in indices if isinstance(index, int))
