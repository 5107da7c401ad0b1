"""Extracts the prompt of a row: a plain prompt, or a logged request to an LLM endpoint.

Sources: OpenAI's API reference, chat completions (model, messages), responses (model, input) and batch (custom_id,
method, url, body); Anthropic's API reference, messages (model, system, messages). The request's body is the row
itself, or is below "request", with an optional "response" beside it, or below "body". A request, and messages, may
also be JSON in a string, as in a CSV.

The texts of a content in parts are joined. Tool calls and reasoning count as empty text; an image, a sound or a file
makes the row invalid. Parameters of a request, such as its temperature, are not part of the prompt.
"""

from __future__ import annotations

import json
from typing import Any

from prefill_router.common.errors import InvalidRowError, shown
from prefill_router.common.schema import INPUT_TOKENS, MESSAGES, MODEL, OUTPUT_TOKENS, PROMPT
from prefill_router.common.usage import Usage, read_usage

TEXT_PARTS = ("text", "input_text", "output_text")
WRAPPERS = ("request", "body", "input")  # keys that hold, or make, a request if there is neither prompt nor messages
BESIDE_MESSAGES = ("system",)
KEYS = (*WRAPPERS, "instructions", "response", "usage", MODEL)

_SILENT_PARTS = ("tool_use", "tool_call", "function_call", "thinking", "redacted_thinking", "reasoning", "refusal")
_CALLS = ("tool_calls", "function_call")

Fields = dict[str, Any]


def prompt_of(fields: Fields) -> tuple[object, object, list[str]]:
    """Returns a row's prompt or its messages, unchecked, and the keys of its messages that are ignored.

    Raises InvalidRowError if the row has neither.
    """
    body = _body(fields)
    held = next((key for key in (MESSAGES, PROMPT, "input") if _holds(body, key)), None)
    if held is None:
        if PROMPT in fields:
            return fields[PROMPT], None, []
        raise InvalidRowError(
            f"has neither {PROMPT} nor {MESSAGES}"
            if body is fields
            else f"holds no request: it has none of {MESSAGES}, input and {PROMPT}"
        )
    value = body[held]
    if held == PROMPT or (held == "input" and isinstance(value, str)):
        return value, None, []
    value = _parsed(value, "[", held)
    if not isinstance(value, list):
        return None, value, []
    system = _text(body.get("instructions" if held == "input" else "system"), "system")
    messages: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    left_out: dict[str, None] = {}
    for i, message in enumerate(value):
        messages.append(_message(message, f"{held}[{i}]"))
        if isinstance(message, dict):
            left_out.update(dict.fromkeys(key for key in message if key not in ("role", "content", "type")))
    return None, messages, list(left_out)


def _holds(body: Fields, key: str) -> bool:
    """Whether `body` has a value for `key`; a `prompt` object beside an `input` only refers to a template."""
    value = body.get(key)
    return value is not None and not (key == PROMPT and isinstance(value, dict) and "input" in body)


def _message(message: Any, key: str) -> Any:
    """A message with its content as text; an invalid message is returned unchanged, and fails when it is checked."""
    if not isinstance(message, dict):
        return message
    if "role" not in message:
        kind = message.get("type")
        if kind == "function_call_output":
            return {"role": "tool", "content": _text(message.get("output"), key)}
        return {"role": "assistant", "content": ""} if kind in _SILENT_PARTS else message
    if "content" not in message and not any(message.get(call) for call in _CALLS):
        return message
    return {"role": message["role"], "content": _text(message.get("content"), key)}


def model_of(fields: Fields) -> object:
    """The model that was requested, or else the one that the response names."""
    return _body(fields).get("model") or _response(fields).get("model")


def usage_of(fields: Fields) -> dict[str, object]:
    """The fields of the upstream's Usage; of one that cannot be billed, its stated numbers of tokens alone."""
    given = _object(_response(fields).get("usage", fields.get("usage")))
    usage = read_usage(given)
    if usage is not None:
        return usage._asdict()
    prompt = given.get("prompt_tokens", given.get("input_tokens"))
    return {INPUT_TOKENS: prompt, OUTPUT_TOKENS: given.get("completion_tokens", given.get("output_tokens"))}


def extra(fields: Fields, name: str) -> object:
    """The value of our column `name`, if a request log has it under another key: the model and the token counts."""
    if name == MODEL:
        return model_of(fields)
    return usage_of(fields).get(name) if name in Usage._fields else None


def _body(fields: Fields) -> Fields:
    """The request, wherever the row has it."""
    request = _object(fields.get("request")) or fields
    return _object(request.get("body")) or request


def _response(fields: Fields) -> Fields:
    response = _object(fields.get("response"))
    return _object(response.get("body", response))


def _object(value: object) -> Fields:
    try:
        value = _parsed(value, "{", "")
    except InvalidRowError:
        return {}
    return value if isinstance(value, dict) else {}


def _parsed(value: object, begin: str, key: str) -> object:
    """Parses a string that starts with `begin`; returns other values unchanged. Raises InvalidRowError for bad JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith(begin):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRowError(f"{key} = {shown(value)}, is text, but not JSON: {error}") from None


def _text(content: object, key: str) -> object:
    """Joins the text parts of a content; returns "" if there is none, as in an answer that only calls tools."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = _object(part).get("type", "text")
        if kind in _SILENT_PARTS:
            continue
        value = part if isinstance(part, str) else _object(part).get("text")
        if kind == "tool_result":
            value = _text(_object(part).get("content"), key)
        elif kind not in TEXT_PARTS:
            value = None
        if not isinstance(value, str):
            raise InvalidRowError(f"{key}.content holds {shown(part)}, which is not text")
        texts.append(value)
    return "\n".join(texts)
