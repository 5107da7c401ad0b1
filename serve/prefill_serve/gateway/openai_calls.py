"""OpenAI chat completion and response calls, read from clients and rewritten for upstreams.

Only the fields that routing and billing need are read; the model is replaced, and everything else passes through.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from pydantic import ValidationError

from prefill_router.common.errors import UserError
from prefill_router.policy.pool import Target, Upstream
from prefill_serve.gateway.call_record import Usage
from prefill_serve.gateway.events import data_of
from prefill_serve.gateway.upstream_errors import error_message, is_error
from prefill_serve.wire import ROUTED_NAMES, RouteRequest, error_body, input_messages

_ROUTER_FIELDS = ("tolerance", "models", "max_cost_usd", "min_p_correct")
_IMAGES = ("image_url", "input_image", "image")
_NO_MESSAGE = "the upstream failed"
_MOST_TOKENS = 10**8  # a larger usage or limit is invalid
_IMAGE_TOKENS = 2000
# Events without a match, which are most, need no parsing.
_NOTED_IN_CHAT = re.compile(rb'"(usage"\s*:\s*\{|finish_reason"\s*:\s*"|error")|\[DONE\]|^event: ?error', re.M)
_ERROR_EVENT = re.compile(rb"^event: ?error\s*$", re.M)
_NOTED_IN_RESPONSES = re.compile(rb'"error"|response\.(completed|incomplete|failed)')
_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_TEXT_IN_CHAT = re.compile(rb'"(?:content|refusal|reasoning|reasoning_content|arguments)' + _STRING)
_TEXT_IN_RESPONSES = re.compile(rb'"(?:text|refusal|arguments)' + _STRING)
_DELTA_IN_RESPONSES = re.compile(rb'"delta' + _STRING)

Body = dict[str, Any]


class Note(NamedTuple):
    """What the gateway learns from one event of a stream."""

    usage: Usage | None = None
    error: str | None = None
    is_last: bool = False  # the stream may end here; `Call.is_whole` decides
    is_for_caller: bool = True
    answer_id: str | None = None  # under which the upstream may store the answer
    begun: frozenset[int] = frozenset()  # indices of its choices, if the call may have several
    ended: frozenset[int] = frozenset()  # indices of choices that it finishes


class Needs(NamedTuple):
    """Capabilities that a call needs from its target."""

    tools: bool
    images: bool
    output_tokens: int  # the caller's limit, 0 without one


@dataclass(frozen=True)
class Call(ABC):
    """One call with its unmodified body."""

    body: Body
    answer_tokens: int | None = None  # limit on the answer for calls that state none

    path: ClassVar[str]  # below an upstream's base URL
    limit_fields: ClassVar[tuple[str, ...]]  # fields that limit the tokens of an answer

    @classmethod
    def read(cls, raw: bytes) -> Call:
        """Parses a request body. Raises UserError if it is not a JSON object."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise UserError("the body is not valid JSON") from None
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        call = cls(body)
        if not isinstance(body.get("model", ""), str):
            raise UserError("model: must be a string")
        if not isinstance(body.get("stream", False), bool | None):
            raise UserError("stream: must be true or false")
        return call

    @property
    def pinned(self) -> str | None:
        """The target that the caller names; None lets the router choose."""
        model = self.body.get("model", ROUTED_NAMES[0])
        return None if model in ROUTED_NAMES else str(model)

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    @abstractmethod
    def messages(self) -> list[Body]:
        """The conversation so far. Raises UserError if the body has none."""

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @property
    def continues(self) -> str | None:
        """The id of an answer stored by an upstream that this call continues."""
        return None

    @property
    def num_answers(self) -> int:
        return 1

    @property
    def stated_limit(self) -> int:
        """The caller's limit on an answer's tokens, the largest of several; 0 without one."""
        return max(_whole(self.body.get(name)) for name in self.limit_fields)

    @cached_property
    def most_input_tokens(self) -> int:
        """An upper bound on input tokens: one per byte, plus a fixed number per image."""
        images = _images([message.get("content") for message in self.messages])
        return _num_bytes(self.body) - sum(map(_num_bytes, images)) + _IMAGE_TOKENS * len(images)

    @property
    def question(self) -> RouteRequest:
        """The routing request for this call. Raises UserError if the router cannot read the conversation."""
        return self._question(messages=self.messages)

    @property
    def allowed(self) -> list[str] | None:
        """The targets that the caller allows. Raises UserError for invalid routing fields."""
        return self._question(prompt="?").models

    def _question(self, **said: Any) -> RouteRequest:
        wishes = {name: self.body[name] for name in _ROUTER_FIELDS if self.body.get(name) is not None}
        try:
            return RouteRequest.model_validate({**said, **wishes})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}") from None

    def for_upstream(self, target: Target) -> bytes:
        """The body for the target's upstream."""
        body = {name: value for name, value in self.body.items() if name not in _ROUTER_FIELDS}
        assert target.upstream is not None
        if self.answer_tokens is not None and not self.stated_limit:
            body = {name: value for name, value in body.items() if name not in self.limit_fields}
            body[self._limit_field(target.upstream)] = self.answer_tokens
        return json.dumps({**body, "model": target.upstream.model or target.name}).encode()

    def _limit_field(self, upstream: Upstream) -> str:  # noqa: ARG002 - for chats
        return self.limit_fields[0]

    # --- answers -------------------------------------------------------------------------------------------------

    @abstractmethod
    def usage(self, answer: Body) -> Usage | None:
        """The usage reported in a whole answer."""

    @abstractmethod
    def text_bytes(self, event: bytes) -> int:
        """Length of the text that an event adds to the answer."""

    @abstractmethod
    def answer_bytes(self, answer: Body) -> int:
        """Length of the text of a whole answer."""

    @abstractmethod
    def answer_id(self, answer: Body) -> str | None:
        """The id under which an upstream stores the answer, for a later call to continue."""

    def error(self, answer: Body) -> str | None:
        """The upstream's error message if an answer is an error."""
        return (error_message(answer) or _NO_MESSAGE) if is_error(answer) else None

    @abstractmethod
    def note(self, event: bytes) -> Note | None:
        """Reads one event; None for most events, which are only for the caller."""

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:  # noqa: ARG002 - for chats
        """Whether a stream is complete at its last event, given the choices that began and ended."""
        return True

    @abstractmethod
    def error_event(self, message: str, code: str) -> bytes:
        """The event that ends a failed stream."""


class ChatCall(Call):
    """POST /v1/chat/completions."""

    path = "/chat/completions"
    limit_fields = ("max_completion_tokens", "max_tokens")

    @cached_property
    def messages(self) -> list[Body]:
        return _objects(self.body.get("messages"), "messages")

    @cached_property
    def needs(self) -> Needs:
        has_tools = any(self.body.get(name) for name in ("tools", "functions"))
        reserved = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        contents = [message.get("content") for message in self.messages]
        return Needs(has_tools, bool(_images(contents)), reserved if isinstance(reserved, int) else 0)

    @property
    def num_answers(self) -> int:
        return _whole(self.body.get("n")) or 1

    def _limit_field(self, upstream: Upstream) -> str:
        return upstream.limit_field

    @property
    def _wants_usage(self) -> bool:
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def for_upstream(self, target: Target) -> bytes:
        if not self.is_stream or self._wants_usage:
            return super().for_upstream(target)
        options = self.body.get("stream_options")
        given = options if isinstance(options, dict) else {}
        body = {**self.body, "stream_options": {**given, "include_usage": True}}
        return replace(self, body=body).for_upstream(target)

    def usage(self, answer: Body) -> Usage | None:
        return _usage(answer.get("usage"), "prompt_tokens", "completion_tokens", "prompt_tokens_details")

    def text_bytes(self, event: bytes) -> int:
        return sum(map(len, _TEXT_IN_CHAT.findall(event)))

    def answer_bytes(self, answer: Body) -> int:
        return self.text_bytes(_encoded(answer))

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
        is_for_caller = not isinstance(body.get("usage"), dict) or self._wants_usage or bool(choices)
        begun = _indices(choices) if has_many else frozenset[int]()
        ended = _indices(choices, "finish_reason")
        error = self.error(body)
        if error is None and _ERROR_EVENT.search(event):
            error = error_message(body) or _NO_MESSAGE
        return Note(usage, error, is_for_caller=is_for_caller, begun=begun, ended=ended)

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:
        """[DONE] is not enough: some upstreams send it after an incomplete answer."""
        return bool(ended) and begun <= ended

    def error_event(self, message: str, code: str) -> bytes:
        return b"data: %b\n\n" % json.dumps(error_body(502, message, code)).encode()


class ResponsesCall(Call):
    """POST /v1/responses."""

    path = "/responses"
    limit_fields = ("max_output_tokens",)

    @cached_property
    def messages(self) -> list[Body]:
        given = self.body.get("input")
        instructions = self.body.get("instructions")
        before = [{"role": "system", "content": instructions}] if isinstance(instructions, str) else []
        return [*before, *input_messages(given if isinstance(given, str) else _objects(given, "input"))]

    @cached_property
    def needs(self) -> Needs:
        reserved = self.body.get("max_output_tokens")
        contents = [message.get("content") for message in self.messages]
        has_images = bool(_images(contents))
        return Needs(bool(self.body.get("tools")), has_images, reserved if isinstance(reserved, int) else 0)

    @property
    def continues(self) -> str | None:
        given = self.body.get("previous_response_id")
        return given if isinstance(given, str) else None

    def usage(self, answer: Body) -> Usage | None:
        return _usage(answer.get("usage"), "input_tokens", "output_tokens", "input_tokens_details")

    def text_bytes(self, event: bytes) -> int:
        return sum(map(len, _DELTA_IN_RESPONSES.findall(event)))

    def answer_bytes(self, answer: Body) -> int:
        return sum(map(len, _TEXT_IN_RESPONSES.findall(_encoded(answer))))

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
            return Note(self.usage(answer), self.error(answer) or _NO_MESSAGE)
        if kind == "error":
            return Note(error=error_message(body) or _NO_MESSAGE)
        return Note(error=self.error(body)) if kind is None else None

    def error_event(self, message: str, code: str) -> bytes:
        event = {"type": "error", "code": code, "message": message, "param": None}
        return b"event: error\ndata: %b\n\n" % json.dumps(event).encode()


def json_object(data: bytes) -> Body:
    """Parses a JSON object; empty if the bytes are not one."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _objects(given: Any, name: str) -> list[Body]:
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise UserError(f"{name}: must be a list of at least one object")
    return given


def _images(contents: list[Any]) -> list[Body]:
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") in _IMAGES]


def _encoded(body: Body) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _num_bytes(body: Body) -> int:
    return len(_encoded(body))


def _whole(given: Any) -> int:
    """A positive integer as lenient upstreams read it ("5" and 5.0 count); 0 for anything else."""
    try:
        return min(max(int(given), 0), _MOST_TOKENS)
    except (TypeError, ValueError, OverflowError):
        return 0


def _usage(given: Any, input_name: str, output_name: str, details_name: str) -> Usage | None:
    """Parses a usage; None if a number is not an integer, negative, too large, or cached tokens exceed the input."""
    if not isinstance(given, dict):
        return None
    details = given.get(details_name)
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    numbers: list[Any] = [given.get(input_name), given.get(output_name), cached or 0]
    if not all(type(number) is int and 0 <= number <= _MOST_TOKENS for number in numbers):
        return None
    usage = Usage(*numbers)
    return usage if usage.cached_tokens <= usage.input_tokens else None


def _indices(choices: Any, having: str | None = None) -> frozenset[int]:
    """Indices of a chunk's choices: all, or those with a non-empty field."""
    given = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    indices = [choice.get("index", 0) for choice in given if having is None or choice.get(having)]
    return frozenset(index for index in indices if isinstance(index, int))
