"""What goes over the wire: requests, answers and errors of the endpoint."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from prefill_router.common.errors import UnfitError, UserError
from prefill_router.common.validation import StrictModel
from prefill_router.corpus.openai_requests import TEXT_PARTS
from prefill_router.corpus.reader import Prompt, Role, fit_messages, fit_prompt
from prefill_router.policy.decision import Policy

ROUTED_NAMES = ("auto", "routed")  # as `model`, they leave the choice to the router

# What every flavour of regular expressions and of white space takes for something to read.
_VISIBLE = r"[^\s\u001c-\u001f\u0085\ufeff]"
_TEXT: dict[str, Any] = {"type": "string", "pattern": _VISIBLE}
_HAS_TEXT: dict[str, Any] = {
    "required": ["content"],
    "properties": {
        "content": {
            "anyOf": [
                _TEXT,
                {
                    "type": "array",
                    "contains": {
                        "required": ["type", "text"],
                        "properties": {"type": {"enum": list(TEXT_PARTS)}, "text": _TEXT},
                    },
                },
            ]
        }
    },
}
_WAYS = ("prompt", "question", "messages", "input")
_ONE_WAY: list[Any] = [
    {
        "required": [way],
        "properties": {name: {"type": "null"} if name != way else {"not": {"type": "null"}} for name in _WAYS},
    }
    for way in _WAYS
]

_Name = Annotated[str, StringConstraints(min_length=1)]
_QUESTION = "If a train travels 60 km in 45 minutes, what is its average speed?"


class ContentPart(BaseModel):
    """A part of a message. Text is read; an image, a sound or a file is noted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message as OpenAI's API has it. Its role and its text are read, the rest is noted or has no say."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Role
    content: str | list[ContentPart] | None = Field(None, examples=[_QUESTION])

    def read(self, noted: Counter[str]) -> dict[str, str]:
        noted.update(key for key in ("tool_calls", "function_call", "audio") if (self.model_extra or {}).get(key))
        if not isinstance(self.content, list):
            return {"role": self.role, "content": self.content or ""}
        noted.update(part.type for part in self.content if part.type not in TEXT_PARTS)
        texts = [part.text for part in self.content if part.type in TEXT_PARTS and part.text is not None]
        return {"role": self.role, "content": "\n".join(texts)}


def input_messages(given: Any) -> Any:
    """A response's input as messages, so that the router reads it; what is neither text nor objects stays as it is."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        return given
    return [_as_message(item) if isinstance(item, dict) else item for item in given]


def _as_message(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "function_call_output":
        output = item.get("output")
        return {"role": "tool", "content": output if isinstance(output, str | list) else json.dumps(output)}
    if kind != "message":
        return {"role": "assistant", "content": "", "tool_calls": [item]}
    return {"role": item.get("role", "user"), "content": item.get("content")}


_READ_INPUT = BeforeValidator(input_messages, json_schema_input_type=str | list[Message])


class Question(NamedTuple):
    """What a request asks about, how often it held what is no text, by its kind, and its fields that have no say."""

    prompt: Prompt
    noted: dict[str, int]
    ignored: list[str]


class RouteRequest(StrictModel):
    """A prompt, bare or as messages, and what the caller wants of the decision.

    Other fields, as those of a body for OpenAI, have no say; one that is nearly a field of these is refused.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "oneOf": _ONE_WAY,
            "examples": [
                {"prompt": _QUESTION},
                {"messages": [{"role": "user", "content": _QUESTION}], "tolerance": 0.02, "explain": True},
            ],
        },
    )

    prompt: str | None = Field(None, pattern=_VISIBLE, description="A bare prompt; or give question, messages or input")
    question: str | None = Field(None, pattern=_VISIBLE, description="The same as prompt")
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(
        None, description="A conversation; one message at least has text", json_schema_extra={"contains": _HAS_TEXT}
    )
    input: Annotated[list[Message], Field(min_length=1), _READ_INPUT] | None = Field(
        None,
        description="A response's input: a prompt, or items, of which one message at least has text",
        json_schema_extra={"pattern": _VISIBLE, "contains": _HAS_TEXT, "minItems": 1},
    )
    instructions: str | None = Field(None, description="What stands before input, as a system message")
    tolerance: float | None = Field(None, ge=0.0, le=1.0, description="Give up at most this much P(correct)")
    max_cost_usd: float | None = Field(None, ge=0.0, description="No target that is expected to cost more")
    min_p_correct: float | None = Field(None, ge=0.0, le=1.0, description="No target with a lower P(correct)")
    models: Annotated[list[_Name], Field(min_length=1)] | None = Field(None, description="Targets to choose from")
    model: _Name | None = Field(
        None, description='The target to take, whatever models says; "auto" and "routed" leave it to the router'
    )
    explain: bool = Field(False, description="Say of each target why it was taken or not")

    @model_validator(mode="after")
    def _well_spelt(self) -> RouteRequest:
        extra = self.model_extra or {}
        if len(extra) > _MOST_IGNORED:
            message = "has {num} fields that have no say, must have at most {most}"
            raise PydanticCustomError("too_many", message, {"num": len(extra), "most": _MOST_IGNORED})
        for name in extra:
            if near := difflib.get_close_matches(name, type(self).model_fields, 1, _NEAR):
                message = '{name}: is no field of a request, did you mean "{near}"?'
                raise PydanticCustomError("misspelt", message, {"name": name, "near": near[0]})
        return self

    def question_of(self, max_messages: int) -> Question:
        """Raises UserError unless exactly one of prompt, question, messages and input was given, and holds text."""
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) != 1:
            names = "prompt, question and messages, or input in their place"
            raise UserError(f"give exactly one of {names}, not {' and '.join(given) or 'none'}")
        (way,) = given
        ignored = [*(self.model_extra or {}), *(["instructions"] if self.instructions and way != "input" else [])]
        noted: Counter[str] = Counter()
        try:
            said = self._said()
            if said is None:
                return Question(fit_prompt(getattr(self, way), _ANY_SIZE, way), {}, sorted(ignored))
            if len(said) > max_messages:
                raise UserError(f"{way}: there are {len(said):,} messages, must be at most {max_messages:,}")
            messages = fit_messages([message.read(noted) for message in said])
        except UnfitError as problem:
            raise UserError(str(problem)) from None
        if not any(re.search(_VISIBLE, message["content"]) for message in messages):
            raise UserError(f"{way}: none has text, must hold more than white space")
        return Question(messages, dict(noted), sorted(ignored))

    def _said(self) -> list[Message] | None:
        """The messages; None of a bare prompt."""
        if self.input is None or not self.instructions:
            return self.input or self.messages
        return [Message(role="system", content=self.instructions), *self.input]

    def policy(self) -> Policy:
        is_pinned = self.model is not None and self.model not in ROUTED_NAMES
        allowed = [str(self.model)] if is_pinned else self.models
        return Policy(self.tolerance, allowed, self.max_cost_usd, self.min_p_correct)


_ANY_SIZE = 1 << 62  # a body has its own limit
_MOST_IGNORED = 64  # OpenAI has some 40; each is held beside all of ours
_NEAR = 0.75  # of two names, as difflib measures it: no field of OpenAI's is so near one of ours


class BatchRequest(StrictModel):
    """Requests that are answered together, each by itself."""

    requests: list[RouteRequest] = Field(min_length=1)


class Drift(StrictModel):
    """How far the prompt lies from the training prompts."""

    distance: float = Field(description="Mahalanobis distance, 1 for an ordinary prompt")
    percentile: float = Field(description="Share of training prompts that lie nearer")
    is_out_of_distribution: bool


class Timings(StrictModel):
    """Milliseconds; what was read from the cache took none."""

    tokenize: float
    queue: float
    encode: float
    head: float


class Metadata(StrictModel):
    encoder: str
    input_tokens: int = Field(description="Of the whole prompt, as the encoder's tokenizer counts them")
    is_truncated: bool = Field(description="The encoder read the prompt without its middle, as in training")
    tolerance: float = Field(description="What the decision was made with")
    propensity: float = Field(description="With which the target was chosen: below 1 where others are explored")
    is_canary: bool
    is_cached: bool = Field(description="This caller asked the same prompt lately")
    noted: dict[str, int] = Field(description="Parts of messages that are no text, which nobody read")
    ignored: list[str] = Field(description="The request's fields that have no say in routing")
    drift: Drift | None = None
    timings_ms: Timings


class RouteResponse(StrictModel):
    """The decision, and the estimates behind it: as lists in the order of model_names, and by name."""

    selected_model: str
    model_names: list[str]
    confidences: list[float] = Field(description="P(correct)")
    costs: list[float] = Field(description="Expected, USD")
    metadata: Metadata
    p_correct: dict[str, float]
    expected_cost_usd: dict[str, float]
    expected_output_tokens: dict[str, float]
    router_version: str
    request_id: str
    explanation: dict[str, str] | None = Field(None, description="By target, where it was asked for")


class ErrorDetail(StrictModel):
    message: str
    type: str
    param: str | None = None
    code: str


class ErrorResponse(StrictModel):
    """An error in the shape of the OpenAI API."""

    error: ErrorDetail


class BatchItem(StrictModel):
    """The answer to one request of a batch, or why there is none."""

    index: int
    status: int = Field(200, description="What the request would be answered with by itself")
    response: RouteResponse | None = None
    error: ErrorDetail | None = None


class BatchResponse(StrictModel):
    results: list[BatchItem] = Field(description="In the order of the requests")


class Health(StrictModel):
    """All that a probe is told, as it needs no key."""

    status: str


class Status(StrictModel):
    """What serves, for administrators."""

    router_version: str
    encoder: str
    targets: list[str]
    canary_version: str | None = None
    shadow_version: str | None = None
    refused: str | None = Field(None, description="Why the latest settings were not taken over, if they were not")


class ServedTarget(StrictModel):
    name: str
    input_price: float = Field(description="USD per million tokens")
    output_price: float = Field(description="USD per million tokens")
    can_answer: bool = Field(description="Calls may go there")


class CurvePoint(StrictModel):
    """What the router's choices are worth from this tolerance on, on its validation prompts."""

    tolerance: float
    cost_usd: float = Field(description="Mean, of a prompt")
    accuracy: float


class SinglePoint(StrictModel):
    """What one target for all prompts is worth, on the same prompts."""

    target: str
    cost_usd: float = Field(description="Mean, of a prompt")
    accuracy: float


class RouterCard(StrictModel):
    """The router that serves, and what it was worth when it was trained, at the prices of that time."""

    router_version: str
    encoder: str
    tolerance: float
    targets: list[ServedTarget]
    curve: list[CurvePoint] = Field(description="By ascending tolerance; empty where it was not recorded")
    singles: list[SinglePoint]


def error_type(status: int) -> str:
    """The `type` that the OpenAI API gives errors of a status."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    detail = ErrorDetail(message=message, type=error_type(status), param=param, code=code)
    return ErrorResponse(error=detail).model_dump()
