"""Remembers which fields a target's model was seen to refuse, so that later calls leave them out or go elsewhere.

A field without effect on the answer is left out or renamed at once. A hint, such as a temperature, is left out of later
calls, and at once only if no other target accepts it. Other fields are never left out: calls with them prefer other
targets. What is remembered is forgotten after an hour, as one caller's odd request may have caused it.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from prefill_router.policy.pool import Target
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.refusals import RefusalReason

_KEPT_S = 3600.0
_MOST = 64  # facts of one target
_WITHOUT_EFFECT = (
    "stream_options",
    "user",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
)
_HINTS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "reasoning",
    "reasoning_effort",
    "verbosity",
    "parallel_tool_calls",
    "service_tier",
)
_RENAMES = {("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")}


class _Fact(NamedTuple):
    name: str
    value: bytes | None  # its digest; None if any value is refused


def is_adaptable(reason: RefusalReason) -> bool:
    """Whether the target may accept the request without the field or with its other name."""
    return reason.kind == "parameter" and reason.name is not None and _can_change(reason.name, _new_name(reason))


def is_hint(reason: RefusalReason) -> bool:
    """Whether the answer may be another without the field, so that a target that accepts it is better."""
    return reason.name in _HINTS


class RefusedFields:
    """The fields that one target was seen to refuse. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._facts: OrderedDict[_Fact, tuple[str | None, float]] = OrderedDict()  # new name, time to forget

    def learn(self, reason: RefusalReason, call: Call) -> bool:
        """Remembers the refusal of a field; returns whether it is new."""
        if reason.kind not in ("parameter", "content") or reason.name is None:
            return False
        fact = _Fact(reason.name, _digest(call.body.get(reason.name)) if reason.is_about_value else None)
        is_new = fact not in self._current()
        self._facts.pop(fact, None)  # the oldest is first
        self._facts[fact] = _new_name(reason), self._clock() + _KEPT_S
        if len(self._facts) > _MOST:
            self._facts.popitem(last=False)
        return is_new

    def are_needed(self, call: Call) -> bool:
        """Whether the call has a refused field that cannot be left out."""
        needed = {name for name, instead in self._of(call) if not _can_change(name, instead)}
        return bool(needed & {*call.body, *(["images"] if call.needs.images else [])})

    def left_out(self, call: Call) -> list[str]:
        """The call's own fields that the target does not get."""
        return [name for name, instead in self._of(call) if instead is None and name in call.body and _can_change(name)]

    def adapted(self, target: Target, call: Call) -> Target:
        """The target, with the refused fields among those to drop and to rename."""
        changes = {name: instead for name, instead in self._of(call) if _can_change(name, instead)}
        if not changes or target.upstream is None:
            return target
        drop = (*target.upstream.drop, *(name for name, instead in changes.items() if instead is None))
        rename = target.upstream.rename | {name: instead for name, instead in changes.items() if instead is not None}
        upstream = target.upstream.model_copy(update={"drop": drop, "rename": rename})
        return target.model_copy(update={"upstream": upstream})

    def _of(self, call: Call) -> list[tuple[str, str | None]]:
        """The refused fields with their new names, without those that the call sets to an accepted value."""
        return [
            (fact.name, instead)
            for fact, (instead, _) in self._current().items()
            if fact.value is None or fact.value == _digest(call.body.get(fact.name))
        ]

    def _current(self) -> OrderedDict[_Fact, tuple[str | None, float]]:
        while self._facts and next(iter(self._facts.values()))[1] <= self._clock():
            self._facts.popitem(last=False)
        return self._facts


def _can_change(name: str, instead: str | None = None) -> bool:
    return instead is not None or name in _WITHOUT_EFFECT or name in _HINTS


def _new_name(reason: RefusalReason) -> str | None:
    """The field's name at the upstream; None for names that an upstream suggests without the same meaning."""
    return reason.instead if (reason.name, reason.instead) in _RENAMES else None


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
