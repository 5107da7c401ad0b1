"""The endpoint's JSON: requests, responses and errors."""

from __future__ import annotations

import difflib
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from prefill_router.common.errors import InvalidRowError, UserError
from prefill_router.common.validation import StrictModel
from prefill_router.corpus.openai_requests import TEXT_PARTS
from prefill_router.corpus.reader import Prompt, Role, validate_messages, validate_prompt
from prefill_router.policy.decision import Policy, ReasonCode
from prefill_serve.http_errors import ErrorDetail
from prefill_serve.provider_messages import chat_messages, content_messages, input_messages, text_parts

ROUTED_NAMES = ("auto", "routed")  # values of `model` that let the router choose

# A visible character in every regular expression dialect and definition of white space.
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
_PART_HAS_TEXT = {"required": ["text"], "properties": {"text": _TEXT, "thought": {"const": False}}}
_PARTS_HAVE_TEXT: dict[str, Any] = {
    "required": ["parts"],
    "properties": {"parts": {"type": "array", "contains": _PART_HAS_TEXT}},
}
_PROMPT_FIELDS = ("prompt", "question", "messages", "input", "contents")
_EXACTLY_ONE: list[Any] = [
    {
        "required": [given],
        "properties": {
            name: {"type": "null"} if name != given else {"not": {"type": "null"}} for name in _PROMPT_FIELDS
        },
    }
    for given in _PROMPT_FIELDS
]

_Name = Annotated[str, StringConstraints(min_length=1)]
QUESTION = "If a train travels 60 km in 45 minutes, what is its average speed?"
EXAMPLE_ID = "my-request-1"
REQUEST_ID: dict[str, Any] = {  # a parameter of the OpenAPI document
    "name": "x-request-id",
    "in": "header",
    "description": "Names the request, for logs and feedback; without it, the answer's header has a new id",
    "schema": {"type": "string"},
    "example": EXAMPLE_ID,
}


class ContentPart(BaseModel):
    """A part of a message. Text is read; images, audio and files are only counted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of OpenAI's API. Only role and text are read."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Role
    content: str | list[ContentPart] | None = Field(None, examples=[QUESTION])

    def read(self, noted: Counter[str]) -> dict[str, str]:
        """Returns role and text, and counts tool calls and other parts that are not text in `noted`."""
        noted.update(key for key in ("tool_calls", "function_call", "audio") if (self.model_extra or {}).get(key))
        if not isinstance(self.content, list):
            return {"role": self.role, "content": self.content or ""}
        noted.update(part.type for part in self.content if part.type not in TEXT_PARTS)
        texts = [part.text for part in self.content if part.type in TEXT_PARTS and part.text is not None]
        return {"role": self.role, "content": "\n".join(texts)}


class GooglePart(BaseModel):
    """A part of Google's contents. Text is read, except that of thoughts."""

    model_config = ConfigDict(extra="allow", frozen=True)

    text: str | None = None


class GoogleContent(BaseModel):
    """A message of Google's API, or its system instruction."""

    role: Literal["user", "model", "function"] = "user"
    parts: list[GooglePart]


_READ_MESSAGES = BeforeValidator(chat_messages, json_schema_input_type=list[Message])
_READ_INPUT = BeforeValidator(input_messages, json_schema_input_type=str | list[Message])
_READ_CONTENTS = BeforeValidator(content_messages, json_schema_input_type=list[GoogleContent])
_READ_SYSTEM = BeforeValidator(text_parts, json_schema_input_type=str | list[ContentPart])
_READ_INSTRUCTION = BeforeValidator(text_parts, json_schema_input_type=GoogleContent)
_NO_TEMPLATE = BeforeValidator(lambda given: None if isinstance(given, dict) else given)  # of a response


class Question(NamedTuple):
    """The prompt of a request, the number of non-text parts by kind, and the fields that do not affect routing."""

    prompt: Prompt
    noted: dict[str, int]
    ignored: list[str]


class RouteRequest(StrictModel):
    """A prompt, as text or messages, and the caller's constraints on the decision.

    Other fields, such as those of a provider's body, are ignored; a probable misspelling of a field here is an error.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "oneOf": _EXACTLY_ONE,
            "examples": [
                {"prompt": QUESTION},
                {"messages": [{"role": "user", "content": QUESTION}], "tolerance": 0.02, "explain": True},
            ],
        },
    )

    prompt: Annotated[str | None, _NO_TEMPLATE] = Field(
        None, pattern=_VISIBLE, description="Prompt text; or give question, messages or input"
    )
    question: str | None = Field(None, pattern=_VISIBLE, description="Same as prompt")
    messages: Annotated[list[Message], Field(min_length=1), _READ_MESSAGES] | None = Field(
        None,
        description="A conversation; one message or more must have text",
        json_schema_extra={"contains": _HAS_TEXT, "minItems": 1},
    )
    system: Annotated[str | list[ContentPart], _READ_SYSTEM] | None = Field(
        None, description="System message before messages"
    )
    input: Annotated[list[Message], Field(min_length=1), _READ_INPUT] | None = Field(
        None,
        description="The input of a response: a prompt, or items of which at least one message has text",
        json_schema_extra={"pattern": _VISIBLE, "contains": _HAS_TEXT, "minItems": 1},
    )
    instructions: str | None = Field(None, description="System message before input")
    contents: Annotated[list[Message], Field(min_length=1), _READ_CONTENTS] | None = Field(
        None,
        description="A conversation of Google's API; one part or more must have text",
        json_schema_extra={"contains": _PARTS_HAVE_TEXT, "minItems": 1},
    )
    system_instruction: Annotated[list[ContentPart], _READ_INSTRUCTION] | None = Field(
        None,
        validation_alias=AliasChoices("systemInstruction", "system_instruction"),
        description="System message before contents; or system_instruction",
    )
    tolerance: float | None = Field(
        None, ge=0.0, le=1.0, description="Largest P(correct) to give up for a cheaper target"
    )
    max_cost_usd: float | None = Field(None, ge=0.0, description="Excludes targets with a higher expected cost")
    min_p_correct: float | None = Field(None, ge=0.0, le=1.0, description="Excludes targets with a lower P(correct)")
    max_latency_s: float | None = Field(
        None, gt=0.0, description="Excludes targets whose whole answer is expected to take longer, if that is known"
    )
    models: Annotated[list[_Name], Field(min_length=1)] | None = Field(None, description="Targets to choose from")
    model: _Name | None = Field(
        None, description='Target to use, overriding models; "auto" and "routed" let the router choose'
    )
    explain: bool = Field(False, description="Explain for each target why it was chosen or not")

    @model_validator(mode="after")
    def _refuse_misspellings(self) -> RouteRequest:
        extra = self.model_extra or {}
        if len(extra) > _MAX_IGNORED:
            message = "has {num} fields that do not affect routing, must have at most {most}"
            raise PydanticCustomError("too_many", message, {"num": len(extra), "most": _MAX_IGNORED})
        for name in extra:
            near = difflib.get_close_matches(name, type(self).model_fields, 1, _NEAR)
            if near and name not in _OF_PROVIDERS:
                message = '{name}: unknown field, did you mean "{near}"?'
                raise PydanticCustomError("misspelt", message, {"name": name, "near": near[0]})
        return self

    def question_of(self, max_messages: int) -> Question:
        """Returns the prompt. Raises UserError unless exactly one of the fields for it has text."""
        given = [name for name in _PROMPT_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            names = "prompt, question and messages, or input or contents in their place"
            raise UserError(f"give exactly one of {names}, not {' and '.join(given) or 'none'}")
        (name,) = given
        ignored = [*(self.model_extra or {}), *self._unread(name)]
        noted: Counter[str] = Counter()
        try:
            conversation = self._conversation(name)
            if conversation is None:
                return Question(validate_prompt(getattr(self, name), _ANY_SIZE, name), {}, sorted(ignored))
            if len(conversation) > max_messages:
                raise UserError(f"{name}: has {len(conversation):,} messages, must have at most {max_messages:,}")
            messages = validate_messages([message.read(noted) for message in conversation])
        except InvalidRowError as problem:
            raise UserError(str(problem)) from None
        if not any(re.search(_VISIBLE, message["content"]) for message in messages):
            raise UserError(f"{name}: no message has text, must have more than white space")
        return Question(messages, dict(noted), sorted(ignored))

    def _unread(self, given: str) -> Iterator[str]:
        """Fields here that are not read because of the one that has the prompt."""
        yield from (system for name, system in _SYSTEM_OF.items() if name != given and getattr(self, system))
        if given != "prompt" and "prompt" in self.model_fields_set:  # refers to a template
            yield "prompt"

    def _conversation(self, given: str) -> list[Message] | None:
        """The messages, with those of the system in front; None for a prompt given as text."""
        if given not in _SYSTEM_OF:
            return None
        messages: list[Message] = getattr(self, given)
        system = getattr(self, _SYSTEM_OF[given])
        return [Message(role="system", content=system), *messages] if system else messages

    def policy(self) -> Policy:
        is_pinned = self.model is not None and self.model not in ROUTED_NAMES
        allowed = [str(self.model)] if is_pinned else self.models
        return Policy(self.tolerance, allowed, self.max_cost_usd, self.min_p_correct, self.max_latency_s)


_ANY_SIZE = 1 << 62  # the limit on the body applies
_SYSTEM_OF = {"messages": "system", "input": "instructions", "contents": "system_instruction"}
_MAX_IGNORED = 64  # OpenAI has about 40; each is compared with all of ours
_OF_PROVIDERS = {"context", "modelId", "model_list", "prompt_id"}  # Ollama's, Amazon's, LiteLLM's
_NEAR = 0.75  # difflib ratio of two names; any OpenAI field and one of ours have less


class BatchRequest(StrictModel):
    """Requests that are routed together, each with its own result."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"requests": [{"prompt": QUESTION}, {"prompt": "Name a river.", "explain": True}]}]
        }
    )

    requests: list[RouteRequest] = Field(min_length=1)


class Drift(StrictModel):
    """Distance of the prompt from the training prompts."""

    distance: float = Field(description="Mahalanobis distance, 1 for a typical prompt")
    percentile: float = Field(description="Share of training prompts with a smaller distance")
    is_out_of_distribution: bool


class Timings(StrictModel):
    """Milliseconds by phase; all 0 for a cached prompt."""

    tokenize: float
    queue: float
    encode: float
    head: float


# Left out while empty, so that older clients, which refuse unknown fields, read the answer.
MISSING_ENCODERS: Any = Field(
    [], exclude_if=operator.not_, description="Encoders that failed: the estimates are made without them"
)


def _known(what: str) -> Any:
    """A field by target, left out while empty, as `MISSING_ENCODERS` is."""
    return Field({}, exclude_if=operator.not_, description=f"{what}, by target where known, if explain is true")


class Metadata(StrictModel):
    encoder: str
    missing_encoders: list[str] = MISSING_ENCODERS
    input_tokens: int = Field(description="Tokens of the whole prompt, by the tokenizer of the first encoder in use")
    is_truncated: bool = Field(description="The middle of the prompt was cut before encoding, as in training")
    tolerance: float = Field(description="Tolerance of this decision")
    propensity: float = Field(description="Probability of choosing this target: below 1 with exploration")
    is_canary: bool
    is_cached: bool = Field(description="Estimates come from this caller's earlier request with the same prompt")
    noted: dict[str, int] = Field(description="Number of message parts that are not text, which were not read, by type")
    ignored: list[str] = Field(description="Fields of the request that do not affect routing")
    drift: Drift | None = None
    timings_ms: Timings


class TargetReason(StrictModel):
    """Why a target was or was not chosen: the constraint that decided, its value, and what it was compared to."""

    code: ReasonCode
    value: float | None = Field(
        None,
        description="P(correct) below the best target's for chosen and tolerance; expected cost for max_cost_usd and"
        " not_cheapest; P(correct) for min_p_correct; probability for explored",
    )
    limit: float | None = Field(
        None, description="What the value was compared to: the limit of the request, or the chosen target's cost"
    )


class RouteResponse(StrictModel):
    """The decision and its estimates, as lists in the order of model_names and by target name."""

    selected_model: str
    model_names: list[str]
    confidences: list[float] = Field(description="P(correct)")
    costs: list[float] = Field(description="Expected cost in USD")
    metadata: Metadata
    p_correct: dict[str, float]
    expected_cost_usd: dict[str, float]
    expected_output_tokens: dict[str, float]
    expected_first_token_s: dict[str, float] = _known("Expected seconds to the first token")
    expected_s: dict[str, float] = _known("Expected seconds to the end of the answer")
    router_version: str
    request_id: str
    explanation: dict[str, str] | None = Field(None, description="By target, if explain is true")
    reasons: dict[str, TargetReason] = Field(
        {}, exclude_if=operator.not_, description="Explanation for programs, by target, if explain is true"
    )


class BatchItem(StrictModel):
    """The result of one request of a batch: a response or an error."""

    index: int
    status: int = Field(200, description="HTTP status that the request would get on its own")
    response: RouteResponse | None = None
    error: ErrorDetail | None = None


class BatchResponse(StrictModel):
    results: list[BatchItem] = Field(description="In the order of the requests")


class Health(StrictModel):
    """The response to a probe, which needs no key."""

    status: str


class Status(StrictModel):
    """Loaded routers, for administrators."""

    router_version: str
    encoder: str
    missing_encoders: dict[str, str] = Field({}, description="Encoders that are not in use, and why")
    targets: list[str]
    canary_version: str | None = None
    shadow_version: str | None = None
    refused: str | None = Field(None, description="Why the latest settings were refused, if they were")


def in_plain_words(problem: Mapping[str, Any]) -> str:
    """The message of a validation error of pydantic, where its own is not for people."""
    if problem["type"] == "string_pattern_mismatch" and problem["ctx"]["pattern"] == _VISIBLE:
        return "has no text, must have more than white space"
    if problem["type"] == "too_short":
        return "is empty, must have one item or more"
    if problem["type"] == "missing":
        return "is missing"
    return str(problem["msg"])
