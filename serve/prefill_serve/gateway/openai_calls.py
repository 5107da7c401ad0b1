"""Calls as clients make them and upstreams understand them: OpenAI's chat completions and responses.

A call is read as little as possible: what decides the way is taken out, the model is renamed, all else passes through.
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
from prefill_serve.gateway.upstream_errors import is_error, said_in
from prefill_serve.wire import ROUTED_NAMES, RouteRequest, error_body, input_messages

_ROUTER_FIELDS = ("tolerance", "models", "max_cost_usd", "min_p_correct")
_IMAGES = ("image_url", "input_image", "image")
_UNSAID = "the upstream failed"
_MOST_TOKENS = 10**8  # no call has more: a usage or a limit beyond is none
_IMAGE_TOKENS = 2000
# Most events have none of it, and need not be parsed.
_NOTED_IN_CHAT = re.compile(rb'"(usage"\s*:\s*\{|finish_reason"\s*:\s*"|error")|\[DONE\]|^event: ?error', re.M)
_ERROR_EVENT = re.compile(rb"^event: ?error\s*$", re.M)
_NOTED_IN_RESPONSES = re.compile(rb'"error"|response\.(completed|incomplete|failed)')
_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_TEXT_IN_CHAT = re.compile(rb'"(?:content|refusal|reasoning|reasoning_content|arguments)' + _STRING)
_TEXT_IN_RESPONSES = re.compile(rb'"(?:text|refusal|arguments)' + _STRING)
_DELTA_IN_RESPONSES = re.compile(rb'"delta' + _STRING)

Body = dict[str, Any]


class Note(NamedTuple):
    """What an event of a stream tells the gateway."""

    usage: Usage | None = None
    error: str | None = None
    is_last: bool = False  # an answer that ends after it may be whole; `Call.is_whole` tells
    is_for_caller: bool = True
    answer_id: str | None = None  # by which the upstream may keep the answer
    begun: frozenset[int] = frozenset()  # choices that it is about, where there may be many
    ended: frozenset[int] = frozenset()  # choices that end with it


class Needs(NamedTuple):
    """What a target must be able to do."""

    tools: bool
    images: bool
    output_tokens: int  # that the caller reserves, 0 where it sets no limit


@dataclass(frozen=True)
class Call(ABC):
    """One call, with its body as it came."""

    body: Body
    answer_tokens: int | None = None  # the limit of an answer, where the caller states none

    path: ClassVar[str]  # below an upstream's base URL
    limit_fields: ClassVar[tuple[str, ...]]  # that limit the tokens of an answer

    @classmethod
    def read(cls, raw: bytes) -> Call:
        """Raises UserError for what is no JSON object."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise UserError("the body is no JSON") from None
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
        """The target that the caller names; None leaves the choice to the router."""
        model = self.body.get("model", ROUTED_NAMES[0])
        return None if model in ROUTED_NAMES else str(model)

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    @abstractmethod
    def messages(self) -> list[Body]:
        """What was said so far. Raises UserError where the body has no such thing."""

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @property
    def continues(self) -> str | None:
        """The id of an answer that an upstream keeps, and that this call goes on from."""
        return None

    @property
    def num_answers(self) -> int:
        return 1

    @property
    def stated_limit(self) -> int:
        """The caller's limit of an answer's tokens, the largest of several; 0 without one."""
        return max(_whole(self.body.get(name)) for name in self.limit_fields)

    @cached_property
    def most_input_tokens(self) -> int:
        """An upper bound for what was said, images apart: no token has less than a byte."""
        images = _images([message.get("content") for message in self.messages])
        return _num_bytes(self.body) - sum(map(_num_bytes, images)) + _IMAGE_TOKENS * len(images)

    @property
    def question(self) -> RouteRequest:
        """What the router is asked. Raises UserError where it would not understand what was said."""
        return self._question(messages=self.messages)

    @property
    def allowed(self) -> list[str] | None:
        """The targets that the caller leaves to choose from. Raises UserError for wishes that make no sense."""
        return self._question(prompt="?").models

    def _question(self, **said: Any) -> RouteRequest:
        wishes = {name: self.body[name] for name in _ROUTER_FIELDS if self.body.get(name) is not None}
        try:
            return RouteRequest.model_validate({**said, **wishes})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}") from None

    def for_upstream(self, target: Target) -> bytes:
        """The body that the target's upstream gets."""
        body = {name: value for name, value in self.body.items() if name not in _ROUTER_FIELDS}
        assert target.upstream is not None
        if self.answer_tokens is not None and not self.stated_limit:
            body = {name: value for name, value in body.items() if name not in self.limit_fields}
            body[self._limit_field(target.upstream)] = self.answer_tokens
        return json.dumps({**body, "model": target.upstream.model or target.name}).encode()

    def _limit_field(self, upstream: Upstream) -> str:  # noqa: ARG002 - of chats alone
        return self.limit_fields[0]

    # --- answers -------------------------------------------------------------------------------------------------

    @abstractmethod
    def usage(self, answer: Body) -> Usage | None:
        """Of a whole answer."""

    @abstractmethod
    def text_bytes(self, event: bytes) -> int:
        """The length of what an event of a stream adds to the answer."""

    @abstractmethod
    def answer_bytes(self, answer: Body) -> int:
        """The length of what a whole answer says."""

    @abstractmethod
    def answer_id(self, answer: Body) -> str | None:
        """By which an upstream keeps a whole answer, so that another call can go on from it."""

    def error(self, answer: Body) -> str | None:
        """The upstream's words, where an answer says that something went wrong."""
        return (said_in(answer) or _UNSAID) if is_error(answer) else None

    @abstractmethod
    def note(self, event: bytes) -> Note | None:
        """What an event tells the gateway; None of most, which are only for the caller."""

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:  # noqa: ARG002 - of chats alone
        """Is a stream whole at its last event, whose choices were noted as begun and ended?"""
        return True

    @abstractmethod
    def error_event(self, message: str, code: str) -> bytes:
        """How a stream ends that breaks off."""


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

    def answer_id(self, answer: Body) -> str | None:  # noqa: ARG002 - chat completions are not gone on from
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
            error = said_in(body) or _UNSAID
        return Note(usage, error, is_for_caller=is_for_caller, begun=begun, ended=ended)

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:
        """[DONE] alone does not tell: some upstreams send it after whatever they have."""
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
            return Note(self.usage(answer), self.error(answer) or _UNSAID)
        if kind == "error":
            return Note(error=said_in(body) or _UNSAID)
        return Note(error=self.error(body)) if kind is None else None

    def error_event(self, message: str, code: str) -> bytes:
        event = {"type": "error", "code": code, "message": message, "param": None}
        return b"event: error\ndata: %b\n\n" % json.dumps(event).encode()


def json_object(data: bytes) -> Body:
    """The JSON object that bytes hold; an empty one where they hold none."""
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
    """A number above 0 as lenient upstreams read it, who take "5" and 5.0 too; 0 for anything else."""
    try:
        return min(max(int(given), 0), _MOST_TOKENS)
    except (TypeError, ValueError, OverflowError):
        return 0


def _usage(given: Any, input_name: str, output_name: str, details_name: str) -> Usage | None:
    """None for numbers that cannot be: no whole ones, below zero, too many, or more cached than there are."""
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
    """Of the choices of a chunk: all, or those that have a field."""
    given = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    indices = [choice.get("index", 0) for choice in given if having is None or choice.get(having)]
    return frozenset(index for index in indices if isinstance(index, int))
