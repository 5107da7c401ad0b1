"""The target of each conversation, by keys that `conversation_keys` makes of calls."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

Key = bytes
_REMEMBERED = 200_000  # keys, about 300 bytes each; a conversation has one or two


class MainAgent(NamedTuple):
    """An agent of a session, which may be the one that its caller talks to."""

    session: Key
    agent: Key  # its tools and instructions
    has_tools: bool


class Past(NamedTuple):
    """What is known of a conversation from its last answer."""

    target: str
    input_tokens: int = 0  # of its last call, by the upstream's usage if reported
    counted_tokens: int = 0  # of the same prompt, by the encoder
    age_s: float = 0.0  # since the end of that call; infinite if the messages since are others


class _Kept(NamedTuple):
    past: Past
    at_s: float
    main: MainAgent | None


class Conversations:
    """The most recent conversations. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()

    def past(self, keys: Sequence[Key], main: MainAgent | None = None) -> Past | None:
        """The conversation of the first known key or else, if an agent replaced its history, the session's."""
        for key in keys:
            if (kept := self._kept.get(key)) is not None:
                return kept.past._replace(age_s=self._clock() - kept.at_s)
        kept = None if main is None else self._kept.get(main.session)
        return kept.past._replace(age_s=math.inf) if kept is not None and _is_same(kept.main, main) else None

    def target(self, keys: Sequence[Key]) -> str | None:
        """The target of the first known key."""
        past = self.past(keys)
        return None if past is None else past.target

    def keep(self, keys: Sequence[Key], past: Past, main: MainAgent | None = None) -> None:
        """Stores a conversation after an answer. A session's main agent is its first, or its first with tools."""
        kept = _Kept(past, self._clock(), main)
        for key in keys:
            self._keep(key, kept)
        if main is not None:
            known = self._kept.get(main.session)
            if known is None or _is_same(known.main, main) or (main.has_tools and not _has_tools(known.main)):
                self._keep(main.session, kept)
        while len(self._kept) > _REMEMBERED:
            self._kept.popitem(last=False)

    def _keep(self, key: Key, kept: _Kept) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)


def _is_same(known: MainAgent | None, main: MainAgent | None) -> bool:
    return known is not None and main is not None and known.agent == main.agent


def _has_tools(main: MainAgent | None) -> bool:
    return main is not None and main.has_tools
