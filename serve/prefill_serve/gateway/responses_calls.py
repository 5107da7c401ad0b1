"""Calls of OpenAI's responses API."""

from __future__ import annotations

import json
import re
from functools import cached_property

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
from prefill_serve.provider_messages import input_messages

# Events without a match, which are most, need no parsing.
_NOTED_IN_RESPONSES = re.compile(rb'"error"|response\.(completed|incomplete|failed)')
_TEXT_IN_RESPONSES = re.compile(rb'"(?:text|refusal|arguments)' + JSON_STRING)
_DELTA_IN_RESPONSES = re.compile(rb'"delta' + JSON_STRING)


class ResponsesCall(Call):
    """POST /v1/responses."""

    path = "/responses"
    limit_fields = ("max_output_tokens",)

    @cached_property
    def messages(self) -> list[Body]:
        given = self.body.get("input")
        instructions = self.body.get("instructions")
        before = [{"role": "system", "content": instructions}] if isinstance(instructions, str) else []
        return [*before, *input_messages(given if isinstance(given, str) else require_objects(given, "input"))]

    @cached_property
    def needs(self) -> Needs:
        reserved = self.body.get("max_output_tokens")
        contents = [message.get("content") for message in self.messages]
        has_images = bool(image_parts(contents))
        return Needs(bool(self.body.get("tools")), has_images, reserved if isinstance(reserved, int) else 0)

    @property
    def carries_results(self) -> bool:
        given = self.body.get("input")
        return isinstance(given, list) and str(given[-1].get("type")).endswith("_output")

    @property
    def continues(self) -> str | None:
        given = self.body.get("previous_response_id")
        return given if isinstance(given, str) else None

    def text_bytes(self, event: bytes) -> int:
        return sum(map(len, _DELTA_IN_RESPONSES.findall(event)))

    def answer_bytes(self, answer: Body) -> int:
        return sum(map(len, _TEXT_IN_RESPONSES.findall(encoded(answer))))

    def answer_id(self, answer: Body) -> str | None:
        given = answer.get("id")
        return given if isinstance(given, str) else None

    def note(self, event: bytes) -> Note | None:
        if not _NOTED_IN_RESPONSES.search(event):
            return None
        body = json_object(data_of(event))
        kind, response = body.get("type"), body.get("response")
        answer = response if isinstance(response, dict) else {}
        if kind in ("response.completed", "response.incomplete"):
            return Note(self.usage(answer), is_last=True, answer_id=self.answer_id(answer))
        if kind == "response.failed":
            return Note(self.usage(answer), self.error(answer) or NO_MESSAGE)
        if kind == "error":
            return Note(error=error_message(body) or NO_MESSAGE)
        return Note(error=self.error(body)) if kind is None else None

    def error_event(self, message: str, code: str) -> bytes:
        event = {"type": "error", "code": code, "message": message, "param": None}
        return b"event: error\ndata: %b\n\n" % json.dumps(event).encode()
