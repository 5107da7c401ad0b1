"""Which target a conversation has: by the caller's own id of it, or by what was said before."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a ledger's process needs none of it
    from prefill_serve.gateway.openai_calls import Body, Call

Key = bytes
_REMEMBERED = 200_000  # conversations: some 200 bytes each


def keys_of(call: Call, holder: str, session: str | None) -> tuple[list[Key], Key]:
    """Where the target of the call's conversation may be found, the likeliest first; and where it is to be kept.

    Without an id, what a call says is found again before the answer that followed it. Nobody finds what another
    holder's key began.
    """
    if call.continues is not None:
        return [answer_key(holder, call.continues)], _key(holder, "next", call.continues)
    if session:  # an empty header is none
        key = _key(holder, "session", session)
        return [key], key
    digest = hashlib.sha256(_key(holder, "said", ""))
    before: list[Key] = []
    for message in call.messages:
        if message.get("role") == "assistant":
            before.append(digest.digest()[:16])
        digest.update(_said(message))
    return before[::-1], digest.digest()[:16]


def answer_key(holder: str, answer_id: str) -> Key:
    """Of an answer that an upstream keeps, and that only it can go on from."""
    return _key(holder, "answer", answer_id)


class Conversations:
    """The targets of the latest conversations."""

    def __init__(self) -> None:
        self._targets: OrderedDict[Key, str] = OrderedDict()

    def target(self, keys: Sequence[Key]) -> str | None:
        """That of the first key which is known."""
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
    """What of a message tells it from others, however its sender writes it."""
    what = [message.get("role"), message.get("content") or "", message.get("tool_calls") or []]
    return json.dumps(what, sort_keys=True).encode()
