"""Logs of requests to an OpenAI-style endpoint: JSONL, which has no grades and becomes a corpus alone.

Source: OpenAI's API reference, chat completions (model, messages), responses (model, input) and batch (custom_id,
method, url, body). A line is a request's body, {"request": body, "response": answer}, or a line of a batch's input. The
model that was used and the tokens of its answer (usage.completion_tokens, or output_tokens), where the log has them,
are kept in the corpus. Of a content in parts the texts are joined; a part that is no text makes the line bad. A
request's parameters, such as its temperature, are no part of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from prefill_router.corpus import BadRow, UnfitError, shown
from prefill_router.ingest.grades import output_tokens
from prefill_router.ingest.records import Format, Ignored, Item, Options, Record, text
from prefill_router.ingest.text import Fields, read_jsonl
from prefill_router.schema import OUTPUT_TOKENS

_EXTRAS = (pa.field("model", pa.string()), pa.field(OUTPUT_TOKENS, pa.int32()), pa.field("custom_id", pa.string()))
TEXT_PARTS = ("text", "input_text", "output_text")


def read(uri: str, options: Options) -> Iterator[Item]:
    for row, fields in read_jsonl(uri, options.max_record_bytes):
        if isinstance(fields, str):
            yield BadRow(uri, row, None, fields)
            continue
        try:
            prompt, messages, left_out = _prompt(_body(fields))
            extras = _extras(fields)
        except UnfitError as problem:
            yield BadRow(uri, row, None, str(problem))
            continue
        for key in left_out:
            yield Ignored(f"key {shown(key)} of messages")
        yield Record(uri, row, prompt, messages=messages, extras=extras)


def _body(fields: Fields) -> Fields:
    """The request itself, wherever it stands in the line."""
    request = _object(fields.get("request", fields))
    return _object(request.get("body", request))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _prompt(body: Fields) -> tuple[object, list[Any] | None, list[str]]:
    """The prompt or the messages of a request, and the keys of its messages that have no place in ours."""
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
            messages.append(message)  # which `tables` will refuse
    return None, messages, list(left_out)


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


def _extras(fields: Fields) -> dict[str, object]:
    response = _object(fields.get("response"))
    response = _object(response.get("body", response))
    usage = _object(response.get("usage", fields.get("usage")))
    tokens = usage.get("completion_tokens", usage.get("output_tokens"))
    return {
        "model": text(_body(fields).get("model") or response.get("model")),
        OUTPUT_TOKENS: output_tokens(tokens),
        "custom_id": text(fields.get("custom_id")),
    }


FORMAT = Format(
    "openai-log",
    "Requests to an OpenAI-style endpoint, or a batch of them (JSONL): a corpus without outcomes",
    (".jsonl",),
    read,
    _EXTRAS,
    has_messages=True,
)
