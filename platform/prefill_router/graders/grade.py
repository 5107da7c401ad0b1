"""The grade of an answer, and helpers with which graders read a prompt's row.

A wrong answer counts against the target. An answer that could not be graded, for whatever reason, is a missing outcome.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Grade(NamedTuple):
    """The result of grading one answer.

    `score` is from 0 to 1, or None if the answer could not be graded. `reason` is one line for people. `agreement` says
    whether a judge's two scores agreed, None without a judge. `cost_usd` is the cost of the grading itself.
    """

    score: float | None
    reason: str
    agreement: bool | None = None
    cost_usd: float = 0.0


def right(reason: str = "equal") -> Grade:
    return Grade(1.0, reason)


def wrong(reason: str) -> Grade:
    return Grade(0.0, reason)


def missing(reason: str) -> Grade:
    return Grade(None, reason)


def references(row: Row, column: str) -> list[Any]:
    """The acceptable references of a row; empty if the column is absent, null or NaN."""
    value: Any = row.get(column)
    value = value.tolist() if hasattr(value, "tolist") else value
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if not is_absent(v)]


def is_absent(value: object) -> bool:
    return value is None or value != value  # NaN, the null of pandas


def lacking(row: Row, *columns: str) -> str | None:
    """A reason that names the first of these columns without a value in the row, or None."""
    return next((f'the row has no "{column}"' for column in columns if not references(row, column)), None)


def without_reference(row: Row, options: Mapping[str, Any]) -> str | None:
    """The reason why a row is unfit for a grader that needs only a reference, or None."""
    return lacking(row, options["reference"])


def nested(value: object) -> Any:
    """Parses a nested value that a table holds as JSON text; returns others as they are. Raises ValueError."""
    return json.loads(value) if isinstance(value, str) else value


def short(text: object, length: int = 80) -> str:
    """The text on one line, cut to `length` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
