"""Error bodies of upstreams: their message, and the part of it that callers may see.

Providers quote keys and account ids in error messages. Callers get an upstream's message only if it is about their own
request (400, 405, 413, 415, 422), as they need it to fix the request. It is redacted, and no other field is passed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from prefill_router.common.redaction import redacted
from prefill_serve.http_errors import error_body

_NAME = re.compile(r"[\w.\[\]$-]{1,200}", re.ASCII)  # a parameter, a code or a type


def is_error(answer: Mapping[str, Any]) -> bool:
    """Whether an answer or an event is an error, including vLLM's {"object": "error"}."""
    return bool(answer.get("error")) or "error" in (answer.get("object"), answer.get("type"))


def error_answer(content: bytes) -> dict[str, Any]:
    """Parses an error's body: an object, or Google's list of one object; empty if it is neither."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    return body if isinstance(body, dict) else {}


def error_message(answer: Mapping[str, Any]) -> str | None:
    """The message of an error in the format of OpenAI, vLLM, FastAPI or Mistral; None if it has none."""
    error = answer.get("error") or answer
    said = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    if isinstance(said, dict):  # Mistral
        said = said.get("detail")
    if isinstance(said, list) and said and isinstance(said[0], dict):
        said = said[0].get("msg")
    return said if isinstance(said, str) and said else None


def refusal_body(status: int, answer: Mapping[str, Any], target: str, key: str | None, is_too_long: bool) -> bytes:
    """The error body for a caller whose request the upstream rejected. `key` is the upstream's, to redact.

    Clients shorten a conversation at the code that OpenAI has for a prompt that is too long, which others do not send.
    """
    error = answer["error"] if isinstance(answer.get("error"), dict) else answer
    said = error_message(answer)
    message = f"{target}: answered {status}" if said is None else redacted(said, key)
    names = {name: _plain_name(error.get(name), key) for name in ("type", "param", "code")}
    code = names["code"] or ("context_length_exceeded" if is_too_long else "invalid_request")
    refusal = error_body(status, message, code, names["param"])
    if names["type"]:
        refusal["error"]["type"] = names["type"]
    return json.dumps(refusal).encode()


def _plain_name(value: Any, key: str | None) -> str | None:
    """The upstream's value if it is a plain name and holds no credential."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) and redacted(value, key) == value else None
