"""Fields of one API without an equivalent in the other: what prevents a translation, and what is dropped."""

from __future__ import annotations

import json
from collections.abc import Collection
from math import isfinite
from typing import Any, NamedTuple

from prefill_router.common.errors import UserError

Body = dict[str, Any]


class Untranslatable(UserError):  # noqa: N818 - a property of a call
    """A request or an answer has no equivalent in the other API. The message names the field."""


class TranslatedRequest(NamedTuple):
    """A request for the other API, and the names of the fields that it lacks."""

    body: Body
    dropped: list[str]


class DroppedFields:
    """Collects the names of dropped fields, each once. Fields that are null, false, 0 or empty request nothing."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def add(self, name: str) -> None:
        self._names[name] = None

    def add_others(self, given: Body, known: Collection[str], prefix: str = "") -> None:
        """Adds the fields of an object that are not `known`."""
        for name, value in given.items():
            if name not in known and value:
                self.add(f"{prefix}{name}")


def require_none(given: Body, names: Collection[str]) -> None:
    """Raises Untranslatable if one of these fields is set."""
    for name in names:
        if given.get(name):
            raise Untranslatable(name)


def objects(given: Any, name: str) -> list[Body]:
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise Untranslatable(f"{name}: not a list of objects")
    return given


def an_object(given: Any, name: str) -> Body:
    if not isinstance(given, dict):
        raise Untranslatable(f"{name}: not an object")
    return given


def a_string(given: Any, name: str) -> str:
    if not isinstance(given, str):
        raise Untranslatable(f"{name}: not a string")
    return given


def parsed_arguments(given: Any, name: str) -> Body:
    """The arguments of a tool call as an object; empty text means none."""
    try:
        arguments = json.loads(a_string(given, name) or "{}", parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise Untranslatable(f"{name}: not JSON") from None
    return an_object(arguments, name)


def written_arguments(given: Any, name: str) -> str:
    """The arguments of a tool call as text, with characters unescaped as models write them."""
    try:
        return json.dumps(an_object(given, name), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        raise Untranslatable(f"{name}: not JSON") from None


def _finite(text: str) -> float:
    """A number as JSON can write it. Raises ValueError for NaN and infinity, which 1e999 becomes."""
    if not isfinite(number := float(text)):
        raise ValueError(text)
    return number
