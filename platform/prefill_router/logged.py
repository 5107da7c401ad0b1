"""A request that was made to an OpenAI-style endpoint, as a line of a log holds it.

Source: OpenAI's API reference, chat completions (model, messages), responses (model, input) and batch (custom_id,
method, url, body). A line is a request's body, {"request": body, "response": answer}, or a line of a batch's input. Of
a content in parts the texts are joined; a part that is no text makes the line unfit. A request's parameters, such as
its temperature, are no part of a prompt.
"""

from __future__ import annotations

from typing import Any

from prefill_router.errors import UnfitError, shown
from prefill_router.schema import INPUT_TOKENS, MODEL, OUTPUT_TOKENS

TEXT_PARTS = ("text", "input_text", "output_text")

Fields = dict[str, Any]


def is_request(fields: Fields) -> bool:
    """Does a line hold a request, and not a prompt of a corpus?"""
    body = _body(fields)
    return body is not fields or fields.get("input") is not None


def prompt_of(fields: Fields) -> tuple[object, list[Any] | None, list[str]]:
    """The prompt or the messages of a request, unchecked, and the keys of its messages that have no place in ours.

    Raises UnfitError where the line holds no request.
    """
    body = _body(fields)
    held = next((key for key in ("messages", "input", "prompt") if body.get(key) is not None), None)
    if held is None:
        raise UnfitError("holds no request: it has none of messages, input and prompt")
    value = body[held]
    if held == "prompt" or (held == "input" and isinstance(value, str)):
        return value, None, []
    if not isinstance(value, list):
        raise UnfitError(f"{held} = {shown(value)}, must be a list of messages")
    system = body.get("instructions") if held == "input" else None
    messages: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    left_out: dict[str, None] = {}
    for i, message in enumerate(value):
        if isinstance(message, dict) and "role" in message:
            content = _content(message.get("content"), f"{held}[{i}]")
            messages.append({"role": message["role"], "content": content})
            left_out.update(dict.fromkeys(key for key in message if key not in ("role", "content", "type")))
        else:
            messages.append(message)  # which is refused where it is checked
    return None, messages, list(left_out)


def model_of(fields: Fields) -> object:
    """The model that was asked, or that says it answered."""
    return _body(fields).get("model") or _response(fields).get("model")


def usage_of(fields: Fields) -> tuple[object, object]:
    """Tokens of the prompt and of the answer, as the upstream counted them."""
    usage = _object(_response(fields).get("usage", fields.get("usage")))
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    return prompt, usage.get("completion_tokens", usage.get("output_tokens"))


def extra(fields: Fields, name: str) -> object:
    """What a request's log calls otherwise than our columns: the model that was used, and its usage."""
    if name == MODEL:
        return model_of(fields)
    return dict(zip((INPUT_TOKENS, OUTPUT_TOKENS), usage_of(fields), strict=True)).get(name)


def _body(fields: Fields) -> Fields:
    """The request itself, wherever it stands in the line."""
    request = _object(fields.get("request", fields))
    return _object(request.get("body", request))


def _response(fields: Fields) -> Fields:
    response = _object(fields.get("response"))
    return _object(response.get("body", response))


def _object(value: object) -> Fields:
    return value if isinstance(value, dict) else {}


def _content(content: object, key: str) -> object:
    """Text, however it is written; an answer that only calls tools has none."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        value = part if isinstance(part, str) else _object(part).get("text")
        if not isinstance(value, str) or _object(part).get("type", "text") not in TEXT_PARTS:
            raise UnfitError(f"{key}.content holds {shown(part)}, which is no text")
        texts.append(value)
    return "\n".join(texts)
