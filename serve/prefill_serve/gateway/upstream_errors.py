"""Errors as upstreams write them: what they say, and how much of it a caller may see.

Providers quote keys and account ids in them. Callers get an upstream's words only where these are about the caller's
own request (400, 405, 413, 415, 422): without them nobody could mend it. They are redacted, and no other field passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from prefill_router.upstreams.redaction import redacted
from prefill_serve.wire import error_body

_NAME = re.compile(r"[\w.\[\]$-]{1,200}", re.ASCII)  # of a parameter, a code, a type


def is_error(answer: Mapping[str, Any]) -> bool:
    """Does an answer, or an event of one, say that something went wrong? Also vLLM's way, {"object": "error"}."""
    return bool(answer.get("error")) or "error" in (answer.get("object"), answer.get("type"))


def said_in(answer: Mapping[str, Any]) -> str | None:
    """What an error says, as OpenAI, vLLM and FastAPI write it; None where it says nothing."""
    error = answer.get("error") or answer
    said = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    if isinstance(said, list) and said and isinstance(said[0], dict):
        said = said[0].get("msg")
    return said if isinstance(said, str) and said else None


def refusal_body(status: int, answer: Mapping[str, Any], target: str, key: str | None) -> bytes:
    """What a caller gets of an upstream's answer to the caller's own mistake. `key` is the upstream's."""
    error = answer["error"] if isinstance(answer.get("error"), dict) else answer
    said = said_in(answer)
    message = f"{target}: answered {status}" if said is None else redacted(said, key)
    named = {name: _named(error.get(name), key) for name in ("type", "param", "code")}
    refusal = error_body(status, message, named["code"] or "invalid_request", named["param"])
    if named["type"]:
        refusal["error"]["type"] = named["type"]
    return json.dumps(refusal).encode()


def _named(value: Any, key: str | None) -> str | None:
    """A name as the upstream wrote it, if it is one and no credential."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) and redacted(value, key) == value else None
