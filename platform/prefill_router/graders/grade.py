"""What a grader says of an answer, and what all graders ask of a prompt's row.

A wrong answer and one that could not be graded are two things: the first counts against the target, the second is a
missing outcome, whatever it was that failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Grade(NamedTuple):
    """`score` is from 0 to 1, None where the answer could not be graded; `reason` is a line for people.

    `agreement` says whether a judge came to the same in both orders, None where nobody judged; `cost_usd` is what the
    grading itself cost.
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
    """The references of a row, any of which will do; none where the column is absent, null or NaN."""
    value: Any = row.get(column)
    value = value.tolist() if hasattr(value, "tolist") else value
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if not is_absent(v)]


def is_absent(value: object) -> bool:
    return value is None or value != value  # NaN, the null of pandas


def lacking(row: Row, *columns: str) -> str | None:
    """Says which of these columns a row has no value in, the first of them; None where it has all."""
    return next((f'the row has no "{column}"' for column in columns if not references(row, column)), None)


def without_reference(row: Row, options: Mapping[str, Any]) -> str | None:
    """Why a row is unfit for a grader that needs nothing but a reference."""
    return lacking(row, options["reference"])


def nested(value: object) -> Any:
    """A value that tables hold as it is or, where rows differ in shape, as JSON. Raises ValueError for bad JSON."""
    return json.loads(value) if isinstance(value, str) else value


def short(text: object, length: int = 80) -> str:
    """For a reason: one line, cut to a length."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
