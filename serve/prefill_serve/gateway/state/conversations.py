"""The target of each conversation, found by the caller's session id or by the messages so far."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not needed in the ledger's process
    from prefill_serve.gateway.openai_calls import Body, Call

Key = bytes
_REMEMBERED = 200_000  # conversations, about 200 bytes each
# OpenAI's and xAI's, Anthropic's, Google's; and the types of OpenRouter and Anthropic
_SEALS = ("encrypted_content", "signature", "thought_signature")
_SEALED_TYPES = ("reasoning.encrypted", "redacted_thinking")
_DEPTH = 8  # of the places where they occur


def keys_of(call: Call, caller: str, session: str | None) -> tuple[list[Key], Key]:
    """Returns the keys to look up the conversation's target, best first, and the key to store it under.

    Without a session id, a call is found by its messages before each earlier answer. Keys include the caller, so
    callers never find each other's conversations.
    """
    if call.continues is not None:
        return [answer_key(caller, call.continues)], _key(caller, "next", call.continues)
    if session:  # ignore an empty header
        key = _key(caller, "session", session)
        return [key], key
    digest = hashlib.sha256(_key(caller, "said", ""))
    before: list[Key] = []
    for message in call.messages:
        if message.get("role") == "assistant":
            before.append(digest.digest()[:16])
        digest.update(_said(message))
    return before[::-1], digest.digest()[:16]


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


class Conversations:
    """The targets of the most recent conversations."""

    def __init__(self) -> None:
        self._targets: OrderedDict[Key, str] = OrderedDict()

    def target(self, keys: Sequence[Key]) -> str | None:
        """The target of the first known key."""
        return next((self._targets[key] for key in keys if key in self._targets), None)

    def keep(self, keys: Sequence[Key], target: str) -> None:
        for key in keys:
            self._targets[key] = target
            self._targets.move_to_end(key)
        while len(self._targets) > _REMEMBERED:
            self._targets.popitem(last=False)


def _key(*parts: str) -> Key:
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def _said(message: Body) -> bytes:
    """The content that identifies a message, independent of its encoding."""
    what = [message.get("role"), message.get("content") or "", message.get("tool_calls") or []]
    return json.dumps(what, sort_keys=True).encode()
