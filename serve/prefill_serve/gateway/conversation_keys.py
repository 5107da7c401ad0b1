"""The keys of a call's conversation: the caller's session, or the messages so far."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefill_serve.gateway.openai_calls import Body, Call
from prefill_serve.gateway.state.conversations import Key, MainAgent

# OpenAI's and xAI's, Anthropic's, Google's; and the types of OpenRouter and Anthropic
_SEALS = ("encrypted_content", "signature", "thought_signature")
_SEALED_TYPES = ("reasoning.encrypted", "redacted_thinking")
_DEPTH = 8  # of the places where they occur
_INSTRUCTIONS = ("system", "developer")
_MOST_INSTRUCTIONS = 2_000  # characters of the system text that tell agents apart
_SENTENCE = re.compile(r"[^\n.!?;]+")
_DIGIT = re.compile(r"\d")


class Thread(NamedTuple):
    """How the conversation of a call is found, and where it is stored."""

    earlier: list[Key]  # to look up, best first
    own: Key  # to store it under
    main: MainAgent | None = None  # if the caller names the session


def thread_of(call: Call, caller: str, session: str | None) -> Thread:
    """The keys of a call's conversation. They include the caller, so callers never find each other's conversations.

    A caller's session has a conversation for each first user message and set of tools, so that sub-agents are kept
    apart. Without a session id, a call is found by its messages before each earlier answer. Instructions are no part
    of a key: agents write the time into them.
    """
    if call.continues is not None:
        return Thread([answer_key(caller, call.continues)], _key(caller, "next", call.continues))
    if session:  # ignore an empty header
        own = _opening(call, caller, "session", session)
        return Thread([own], own, MainAgent(_key(caller, "session", session), _agent(call), bool(_tools(call))))
    earlier, own = _by_messages(call, caller)
    cache_key = call.body.get("prompt_cache_key")
    if isinstance(cache_key, str) and cache_key:
        own = _opening(call, caller, "cache", cache_key)
        earlier = [own] if earlier else []  # a new conversation may begin like another of the same key
    return Thread(earlier, own)


def answer_key(caller: str, answer_id: str) -> Key:
    """The key of an answer stored by an upstream, which no other target can continue."""
    return _key(caller, "answer", answer_id)


def has_sealed_reasoning(messages: Sequence[Body]) -> bool:
    """Whether an earlier answer has encrypted or signed reasoning, which only its own target can read."""
    return any(_is_sealed(message) for message in messages if message.get("role") == "assistant")


def _is_sealed(part: Any, depth: int = 0) -> bool:
    if depth == _DEPTH or not isinstance(part, dict | list):
        return False
    if isinstance(part, list):
        return any(_is_sealed(item, depth + 1) for item in part)
    is_sealed = part.get("type") in _SEALED_TYPES or any(part.get(name) for name in _SEALS)
    return is_sealed or any(_is_sealed(item, depth + 1) for item in part.values())


def _by_messages(call: Call, caller: str) -> tuple[list[Key], Key]:
    """The keys of the messages before each earlier answer, latest first, and of all."""
    digest = hashlib.sha256(_key(caller, "said", ""))
    before: list[Key] = []
    for message in call.messages:
        if message.get("role") in _INSTRUCTIONS:
            continue
        if message.get("role") == "assistant":
            before.append(digest.digest()[:16])
        digest.update(_said(message))
    return before[::-1], digest.digest()[:16]


def _opening(call: Call, *names: str) -> Key:
    """The key of a conversation by its first message and the names of its tools."""
    said = next((_said(message) for message in call.messages if message.get("role") not in _INSTRUCTIONS), b"")
    return _key(*names, *_tools(call), said.decode())


def _agent(call: Call) -> Key:
    """The key of an agent: its tools, and the sentences of its instructions without digits, which may be of a clock."""
    given = [message.get("content") for message in call.messages if message.get("role") in _INSTRUCTIONS]
    text = "\n".join(_text(content) for content in given)[:_MOST_INSTRUCTIONS]
    sentences = [sentence for sentence in _SENTENCE.findall(text) if not _DIGIT.search(sentence)]
    return _key("agent", *_tools(call), "", *sentences)


def _tools(call: Call) -> list[str]:
    """The sorted names of a call's tools, or types of those without a name."""
    given = call.body.get("tools") or call.body.get("functions")
    tools = [tool for tool in given if isinstance(tool, dict)] if isinstance(given, list) else []
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    return sorted(str(function.get("name") or function.get("type")) for function in functions)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _key(*parts: str) -> Key:
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def _said(message: Body) -> bytes:
    """The content that identifies a message, independent of its encoding and of cache breakpoints, which move."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = [_without_breakpoint(part) for part in content]
    what = [message.get("role"), content, message.get("tool_calls") or []]
    return json.dumps(what, sort_keys=True).encode()


def _without_breakpoint(part: Any) -> Any:
    return {name: part[name] for name in part if name != "cache_control"} if isinstance(part, dict) else part
