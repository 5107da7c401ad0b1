"""Classifies refusals: what an upstream's error says about a request, in the words of each provider.

The class decides what happens next, so an unknown text is harmless: the next target is asked, and nothing is learnt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from prefill_router.upstreams.transport import is_callers_fault
from prefill_serve.gateway.upstream_errors import error_answer, error_message

# too_long: prompt or answer exceed the model's limits; parameter: a field of the body is not supported; content: a
# tool, an image or a text is not accepted; request: anything else
RefusalKind = Literal["too_long", "parameter", "content", "request"]

_OPERATOR_CODES = re.compile(
    r"invalid_api_key|api_key_invalid|insufficient_quota|billing\w*|model_(not_found|decommissioned)|account_\w+"
    r"|organization_restricted|deploymentnotfound|invalid_model",
    re.IGNORECASE,
)
_OPERATOR = re.compile(
    r"api key (not valid|expired|is invalid)|credit balance is too low|organization has been (restricted|disabled)"
    r"|billing (hard limit|account|is )|has been decommissioned|not a valid model id|^invalid model\b|^model not exist"
    r"|^unknown model|^the model [`'\"].*[`'\"] does not exist|user location is not supported"
    r"|only (available|enabled) for api.versions?|enabled only for api versions",
    re.IGNORECASE,
)
_TOO_LONG_CODES = re.compile(
    r"context_length_exceeded|exceed_context_size_error|request_too_large|tokens_limit_reached"
)
_TOO_LONG = re.compile(
    r"context (length|window|size|limit)|maximum (context|prompt|model|input) length|prompt is too long"
    r"|input is too long|request too large|reduce the length of the (messages|prompt|input)"
    r"|token count.* exceeds|inputs?` tokens \+|max_tokens`? is too large|maximum allowed number of output tokens"
    r"|maximum value for `max_tokens`|too many (input )?tokens|supports at most \d+ completion tokens"
    r"|too large for model with \d+ maximum context",
    re.IGNORECASE,
)
_UNSUPPORTED = r"(?:is|are|was) (?:not supported|unsupported|not permitted|not allowed|deprecated|not available)"
# What is learnt from a message is at its beginning, since the rest may quote the caller.
_PARAMETERS = [
    re.compile(pattern)
    for pattern in (
        r"(?:Unsupported|Unknown|Unrecognized) parameter: ['\"`](?P<name>\w+)(?:\.effort|\.summary)?['\"`]",
        r"Unrecognized request arguments? supplied: (?P<name>\w+)",
        rf"(?:property |[Pp]arameter |The )?['\"`]?(?P<name>\w+)['\"`]? (?:parameter )?{_UNSUPPORTED}",
        r"(?P<name>\w+): Extra inputs are not permitted",
        r"Extra inputs are not permitted, field: '(?P<name>\w+)'",
        r"\[\{'type': 'extra_forbidden', 'loc': \('body', '(?P<name>\w+)'\)",
        r"Invalid JSON payload received\. Unknown name \"(?P<name>\w+)\":",
        r"Malformed input request: #: extraneous key \[(?P<name>\w+)\] is not permitted",
        r"Model \S+ does not support parameter (?P<name>\w+)",
        r"Argument not supported on this model: (?P<name>\w+)",
        r"(?:The )?[Mm]odel \S+ does not support ['\"`](?P<name>\w+)['\"`]",
        r"This model does not support (?:the )?['\"`]?(?P<name>\w+)['\"`]? parameter",
        r"Additional properties are not allowed \('(?P<name>\w+)' was unexpected\)$",
    )
]
_VALUES = [
    re.compile(pattern)
    for pattern in (
        r"Unsupported value: ['\"`](?P<name>\w+)(?:\.effort|\.summary)?['\"`] does not support",
        r"['\"`](?P<name>\w+)['\"`] may only be set to",
        r"Invalid parameter: ['\"`](?P<name>\w+)['\"`] of type \S+ is not supported with this model",
    )
]
_INSTEAD = re.compile(r"[Uu]se ['\"`](\w+)['\"`] instead|did you mean ['\"`](\w+)['\"`]")
_CANNOT = re.compile(
    r"(?:does not|doesn't|do not|don't|not) support|not enabled for|is unavailable now|unknown variant `",
    re.IGNORECASE,
)
_LACKS_TOOLS = re.compile(
    r"\S+ does not support (?:tools|function calling)|`?tool calling`? is not supported"
    r"|function calling is not enabled for|\"auto\" tool choice requires|no endpoints found that support tool use",
    re.IGNORECASE,
)
_LACKS_IMAGES = re.compile(
    r"\S+ (?:does not support (?:image|vision)|is not a multimodal model)|image input modality is not enabled for"
    r"|at most 0 image|failed to deserialize the json body into the target type: messages\[\d+\]: unknown variant "
    r"`image_url`|no endpoints found that support image input",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content.?(?:filter|management policy)|was flagged|content_policy_violation", re.IGNORECASE)
_BY_PROXY = re.compile(r"^No endpoints found that support|was flagged", re.IGNORECASE)  # with 403 and 404
_PLAIN = re.compile(r"\w+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_MOST_CHARACTERS = 4000
_RANGES = {  # the values that some API accepts
    "max_tokens": (1, math.inf),
    "max_completion_tokens": (1, math.inf),
    "max_output_tokens": (1, math.inf),
    "n": (1, math.inf),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


class RefusalReason(NamedTuple):
    """Why a request was refused. `name` is a field of the body, "tools" or "images", if the refusal is about one."""

    kind: RefusalKind
    name: str | None = None
    instead: str | None = None  # the name of the field at this upstream
    is_about_value: bool = False  # other values of the field may be accepted


class _Said(NamedTuple):
    message: str
    code: str
    name: str | None  # the field to which the error points, None for a place within a field


def refusal_reason(status: int, answer: Mapping[str, Any]) -> RefusalReason | None:
    """Why a request was refused; None if the upstream failed, or the key or the model's name in the pool is wrong."""
    *_, said = _sayings(answer)
    if not is_callers_fault(status):
        return _unable(said) if status in (403, 404) and _BY_PROXY.search(said.message) else None
    if _OPERATOR_CODES.fullmatch(said.code) or _OPERATOR.search(said.message):
        return None
    about_field = _about_field(said)
    if about_field is not None:
        return about_field
    if status == 413 or _TOO_LONG_CODES.fullmatch(said.code) or _TOO_LONG.search(said.message):
        return RefusalReason("too_long")
    return _unable(said) or RefusalReason("request", said.name)


def is_refused_everywhere(reason: RefusalReason, body: Mapping[str, Any]) -> bool:
    """Whether the field that was refused is a number that every API refuses."""
    value = body.get(reason.name or "")
    if reason.name not in _RANGES or not isinstance(value, int | float):
        return False
    least, most = _RANGES[reason.name]
    return not least <= value <= most


def _about_field(said: _Said) -> RefusalReason | None:
    """A field that the model does not support, or not with this value."""
    found = next((match for pattern in _VALUES if (match := pattern.match(said.message))), None)
    if found is not None or (said.code == "unsupported_value" and said.name is not None):
        return RefusalReason("parameter", found["name"] if found else said.name, is_about_value=True)
    found = next((match for pattern in _PARAMETERS if (match := pattern.match(said.message))), None)
    if found is None and (said.code not in ("unsupported_parameter", "unknown_parameter") or said.name is None):
        return None
    name = found["name"] if found else said.name or ""
    instead = _INSTEAD.search(said.message)
    return RefusalReason("parameter", _CAMEL.sub("_", name).lower(), instead and (instead[1] or instead[2]))


def _unable(said: _Said) -> RefusalReason | None:
    """A kind of content that the model does not support, or a text that it does not accept."""
    if _LACKS_TOOLS.match(said.message):
        return RefusalReason("content", "tools")
    if _LACKS_IMAGES.match(said.message):
        return RefusalReason("content", "images")
    is_content = _FILTERED.search(f"{said.code} {said.message}") or _CANNOT.search(said.message)
    return RefusalReason("content") if is_content else None


def _sayings(answer: Mapping[str, Any]) -> Iterator[_Said]:
    """The error, then the errors in it: those of a validator, or that of a provider behind a proxy."""
    error = answer["error"] if isinstance(answer.get("error"), dict) else answer
    code, param = error.get("code") or error.get("type"), error.get("param")
    name = param if isinstance(param, str) and _PLAIN.fullmatch(param) else None
    yield _Said((error_message(answer) or "")[:_MOST_CHARACTERS], str(code or ""), name)
    for detail in _details(error):
        place = detail.get("loc")
        if isinstance(place, list) and len(place) == 2 and detail.get("type") == "extra_forbidden":
            yield _Said(f"{place[1]}: Extra inputs are not permitted", "", None)
    metadata = error.get("metadata")
    if isinstance(metadata, dict) and isinstance(raw := metadata.get("raw"), str):  # OpenRouter
        yield from _sayings(error_answer(raw.encode()) or {"message": raw})


def _details(error: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The errors of a validator, as FastAPI and Mistral list them."""
    message = error.get("message")
    found = message.get("detail") if isinstance(message, dict) else error.get("detail")
    return [detail for detail in found if isinstance(detail, dict)] if isinstance(found, list) else []
