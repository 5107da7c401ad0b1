"""Calls, read from clients and rewritten for upstreams: what chat completions, responses and messages share.

Only the fields that routing and billing need are read; the model is replaced, and everything else passes through.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import ValidationError

from prefill_router.common.errors import UserError
from prefill_router.common.usage import Usage, read_usage
from prefill_router.policy.pool import Target, Upstream
from prefill_router.upstreams.request_bodies import request_body
from prefill_serve.gateway.upstream_errors import error_message, is_error
from prefill_serve.wire import ROUTED_NAMES, RouteRequest, in_plain_words

ROUTER_FIELDS = ("tolerance", "models", "max_cost_usd", "min_p_correct", "max_latency_s")
_IMAGES = ("image_url", "input_image", "image")
NO_MESSAGE = "the upstream failed"
_MOST_TOKENS = 10**8  # a larger limit is invalid
IMAGE_TOKENS = 2000
JSON_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'

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
    begun_usage: Usage | None = None  # at the start; later events may leave out its input tokens


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
    headers: Mapping[str, str] = field(default_factory=dict)  # of the request, for an upstream of its protocol

    protocol: ClassVar[Literal["openai", "anthropic"]] = "openai"
    path: ClassVar[str]  # below an upstream's base URL
    limit_fields: ClassVar[tuple[str, ...]]  # fields that limit the tokens of an answer

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Parses a request body. Raises UserError if it is not a JSON object."""
        try:
            body = json.loads(raw, parse_float=_finite, parse_constant=_finite)
        except json.JSONDecodeError as error:
            raise UserError(f"the body is not valid JSON: {error.msg} at character {error.pos + 1:,}") from None
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
    def carries_results(self) -> bool:
        """Whether the last message has results of tools, for the target that called them."""
        return self.messages[-1].get("role") in ("tool", "function")

    @property
    def num_answers(self) -> int:
        return 1

    @property
    def stated_limit(self) -> int:
        """The caller's limit on an answer's tokens, the largest of several; 0 without one."""
        return max(positive_int(self.body.get(name)) for name in self.limit_fields)

    @cached_property
    def _text_bytes_and_images(self) -> tuple[int, int]:
        images = image_parts([message.get("content") for message in self.messages])
        return _num_bytes(self.body) - sum(map(_num_bytes, images)), len(images)

    def most_input_tokens(self, max_image_tokens: int = IMAGE_TOKENS) -> int:
        """An upper bound on input tokens: one per byte, plus a fixed number per image."""
        num_bytes, num_images = self._text_bytes_and_images
        return num_bytes + max_image_tokens * num_images

    @cached_property
    def question(self) -> RouteRequest:
        """The routing request for this call. Raises UserError if the router cannot read the conversation."""
        return self._request(messages=self.messages)

    @property
    def allowed(self) -> list[str] | None:
        """The targets that the caller allows. Raises UserError for invalid routing fields."""
        return self._request(prompt="?").models

    def _request(self, **prompt: Any) -> RouteRequest:
        constraints = {name: self.body[name] for name in ROUTER_FIELDS if self.body.get(name) is not None}
        try:
            return RouteRequest.model_validate({**prompt, **constraints})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(f"{'.'.join(str(part) for part in problem['loc'])}: {in_plain_words(problem)}") from None

    def for_upstream(self, target: Target) -> bytes:
        """The body for the target's upstream."""
        body = {name: value for name, value in self.body.items() if name not in ROUTER_FIELDS}
        assert target.upstream is not None
        if self.answer_tokens is not None and not self.stated_limit:
            body = {name: value for name, value in body.items() if name not in self.limit_fields}
            body[self._limit_field(target.upstream)] = self.answer_tokens
        return json.dumps(request_body(target, body)).encode()

    def _limit_field(self, upstream: Upstream) -> str:  # noqa: ARG002 - for chats
        return self.limit_fields[0]

    # --- answers -------------------------------------------------------------------------------------------------

    def usage(self, answer: Body) -> Usage | None:
        """The usage reported in a whole answer."""
        return read_usage(answer.get("usage"))

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
        return (error_message(answer) or NO_MESSAGE) if is_error(answer) else None

    @abstractmethod
    def note(self, event: bytes) -> Note | None:
        """Reads one event; None for most events, which are only for the caller."""

    def is_whole(self, begun: Set[int], ended: Set[int]) -> bool:  # noqa: ARG002 - for chats
        """Whether a stream is complete at its last event, given the choices that began and ended."""
        return True

    @abstractmethod
    def error_event(self, message: str, code: str) -> bytes:
        """The event that ends a failed stream."""

    def refusal(self, status: int, content: bytes) -> bytes:  # noqa: ARG002 - for messages
        """An error body of ours in the caller's protocol."""
        return content


def _finite(text: str) -> float:
    """Parses a number. Raises ValueError for NaN and infinity, which JSON lacks, and for numbers above a float's."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _finite_or_none(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def json_object(data: bytes) -> Body:
    """Parses a JSON object; empty if the bytes are not one. NaN and infinity, which JSON lacks, become null."""
    try:
        body = json.loads(data, parse_float=_finite_or_none, parse_constant=_finite_or_none)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def require_objects(given: Any, name: str) -> list[Body]:
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise UserError(f"{name}: must be a list of at least one object")
    return given


def image_parts(contents: list[Any]) -> list[Body]:
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") in _IMAGES]


def encoded(body: Body) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _num_bytes(body: Body) -> int:
    return len(encoded(body))


def positive_int(given: Any) -> int:
    """A positive integer as lenient upstreams read it ("5" and 5.0 count); 0 for anything else."""
    try:
        return min(max(int(given), 0), _MOST_TOKENS)
    except (TypeError, ValueError, OverflowError):
        return 0
