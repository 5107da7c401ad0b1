"""Adapts a request's body to a target: what the pool sets, drops and renames. Shared by `collect` and the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefill_router.policy.pool import Target, Upstream

_SYSTEM_ROLES = ("system", "developer")


def request_body(target: Target, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the body of a chat completion, response or message as the target's upstream expects it.

    Dropped and renamed fields are the caller's. `extra_body` replaces the caller's fields; nested objects are merged.
    """
    upstream = target.upstream
    assert upstream is not None
    sent = _without_refused(upstream, body)
    is_response = "input" in sent and "messages" not in sent
    if upstream.system_prefix is not None:
        prefixed = _instructed if is_response else _prefixed
        sent |= (prefixed if upstream.protocol == "openai" else _in_system)(upstream.system_prefix, sent)
    extra = _for_responses(upstream.extra_body) if is_response else upstream.extra_body
    return {**_merged(sent, extra), "model": upstream.model or target.name}


def _without_refused(upstream: Upstream, body: Mapping[str, Any]) -> dict[str, Any]:
    sent = {name: value for name, value in body.items() if name not in upstream.drop}
    for name, other in upstream.rename.items():
        if name in sent:
            sent.setdefault(other, sent.pop(name))
    return sent


def _instructed(prefix: str, body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("instructions")
    return {"instructions": f"{prefix}\n\n{given}" if isinstance(given, str) and given else prefix}


def _prefixed(prefix: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The messages with the prefix in the first one if that is a system message, or in a new one."""
    messages = body.get("messages")
    if not isinstance(messages, list):  # invalid; the upstream will say so
        return {}
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    content = first.get("content")
    if first.get("role") not in _SYSTEM_ROLES or not isinstance(content, str | list):
        return {"messages": [{"role": "system", "content": prefix}, *messages]}
    both = f"{prefix}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": prefix}, *content]
    return {"messages": [{**first, "content": both}, *messages[1:]]}


def _in_system(prefix: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The `system` of Anthropic's Messages, which is text or blocks."""
    given = body.get("system")
    if isinstance(given, list):
        return {"system": [{"type": "text", "text": prefix}, *given]}
    return {"system": f"{prefix}\n\n{given}" if isinstance(given, str) and given else prefix}


def _for_responses(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """The Responses API's name for the reasoning effort, so that one target serves both APIs."""
    if "reasoning_effort" not in extra:
        return extra
    others = {name: value for name, value in extra.items() if name != "reasoning_effort"}
    return _merged({"reasoning": {"effort": extra["reasoning_effort"]}}, others)


def _merged(given: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(given)
    for name, value in extra.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
