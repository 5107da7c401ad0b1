"""Conversations of providers' APIs, as messages with the roles and parts of OpenAI's.

Sources: the API references of OpenAI (responses), Anthropic (messages), Google (generateContent) and Amazon (converse).
Only what has another place or shape is changed. Invalid values are returned unchanged, and fail when they are checked.
"""

from __future__ import annotations

import json
from typing import Any

Fields = dict[str, Any]

_RESULTS = {"functionResponse": "response", "function_response": "response", "toolResult": "content"}


def chat_messages(given: Any) -> Any:
    """Converts the `messages` of a chat, of Anthropic's API or of Amazon's; a tool's results become messages."""
    if not isinstance(given, list):
        return given
    return [each for item in given for each in (_split(item) if isinstance(item, dict) else [item])]


def input_messages(given: Any) -> Any:
    """Converts the `input` of a response."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        return given
    return [_of_item(item) if isinstance(item, dict) else item for item in given]


def content_messages(given: Any) -> Any:
    """Converts the `contents` of Google's API."""
    if not isinstance(given, list):
        return given
    return chat_messages([_of_content(item) if isinstance(item, dict) else item for item in given])


def text_parts(given: Any) -> Any:
    """Converts a content, or a system prompt, whose parts may have no type."""
    if isinstance(given, dict) and "parts" in given:
        given = given["parts"]
    return [_typed(part) for part in given] if isinstance(given, list) else given


def is_result(part: Any) -> bool:
    """Whether a part of a message is the result of a tool, as in Anthropic's API."""
    return isinstance(part, dict) and part.get("type") == "tool_result"


def _split(message: Fields) -> list[Fields]:
    """A message as those of a chat: the results of tools, then the rest."""
    content = text_parts(message.get("content"))
    if not isinstance(content, list):
        return [message]
    results = [part for part in content if is_result(part)]
    rest = [part for part in content if not is_result(part)]
    said = [{"role": "tool", "content": _result(result.get("content"))} for result in results]
    return [*said, *([{**message, "content": rest}] if rest or not results else [])]


def _of_content(item: Fields) -> Fields:
    role = item.get("role", "user")
    return {"role": {"model": "assistant", "function": "tool"}.get(role, role), "content": item.get("parts")}


def _of_item(item: Fields) -> Fields:
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role", "user"), "content": item.get("content")}
    if isinstance(kind, str) and kind.endswith("_output"):
        return {"role": "tool", "content": _result(item.get("output"))}
    if isinstance(kind, str) and kind.endswith("_call"):
        return {"role": "assistant", "content": "", "tool_calls": [item]}
    return {"role": "assistant", "content": [item]}  # such as reasoning


def _result(output: Any) -> Any:
    """The result of a tool as a content: text, parts, or JSON."""
    if isinstance(output, str | list | None):
        return text_parts(output)
    return [output] if isinstance(output, dict) and "type" in output else json.dumps(output)


def _typed(part: Any) -> Any:
    """A part with its type, which Amazon and Google give as the name of its only field."""
    if not isinstance(part, dict) or "type" in part:
        return part
    if "stdout" in part:  # of a shell call
        return {"type": "text", "text": f"{part['stdout']}\n{part.get('stderr', '')}".strip()}
    if "json" in part:
        return {"type": "text", "text": json.dumps(part["json"], ensure_ascii=False)}
    if "text" in part:
        return {**part, "type": "thought" if part.get("thought") else "text"}
    kind = next(iter(part), "empty")
    if kind not in _RESULTS or not isinstance(part[kind], dict):
        return {**part, "type": kind}
    value = part[kind].get(_RESULTS[kind])
    content = value if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
    return {"type": "tool_result", "content": content}
