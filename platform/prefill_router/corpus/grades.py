"""Validates a graded answer of a text file: target name, grade in [0, 1], number of tokens, cost."""

from __future__ import annotations

import math
from typing import NamedTuple

from prefill_router.common.errors import InvalidRowError, shown
from prefill_router.common.schema import CORRECT, COST_USD, OUTPUT_TOKENS, TARGET
from prefill_router.corpus.reader import validate_text

_WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
_MISSING = ("", "nan", "na", "n/a", "null", "none")  # as spreadsheets, R and pandas write a missing value
_MAX_NAME_BYTES = 1024
_MAX_TOKENS = (1 << 31) - 1  # the column is an int32


class RawAnswer(NamedTuple):
    """A target's answer to a prompt; `correct` is None if it was never graded."""

    target: object
    correct: object
    output_tokens: object = None
    cost_usd: object = None


class CheckedGrade(NamedTuple):
    """A valid answer; `correct` is None if it was never graded."""

    target: str
    correct: float | None
    output_tokens: int | None
    cost_usd: float | None


def grade(answer: RawAnswer) -> CheckedGrade:
    """Validates an answer. Raises InvalidRowError without a target, or if grade, tokens or cost are out of range."""
    target = validate_text(answer.target, TARGET, _MAX_NAME_BYTES).strip()
    if not target:
        raise InvalidRowError(f"{TARGET} = {shown(answer.target)}, must name a model")
    try:
        correct, tokens = _correct(answer.correct), output_tokens(answer.output_tokens)
        return CheckedGrade(target, correct, tokens, _cost_usd(answer.cost_usd))
    except InvalidRowError as problem:
        raise InvalidRowError(f"{TARGET} {shown(target)}: {problem}") from None


def _correct(value: object) -> float | None:
    if _is_missing(value):
        return None
    number = _number(value)
    if not 0.0 <= number <= 1.0:
        raise InvalidRowError(f"{CORRECT} = {shown(value)}, must be in [0, 1], true, false, yes or no")
    return number


def output_tokens(value: object) -> int | None:
    """A number of tokens, or None if missing. Raises InvalidRowError for other values."""
    if _is_missing(value):
        return None
    number = math.nan if isinstance(value, bool) else _number(value)
    if not (0 <= number <= _MAX_TOKENS and number.is_integer()):
        raise InvalidRowError(f"{OUTPUT_TOKENS} = {shown(value)}, must be a whole number, 0 or more")
    return int(number)


def _cost_usd(value: object) -> float | None:
    """A cost, or None if missing, which pandas writes as NaN. Raises InvalidRowError for other values."""
    if _is_missing(value) or (isinstance(value, float) and math.isnan(value)):
        return None
    number = math.nan if isinstance(value, bool) else _number(value)
    if not 0.0 <= number < math.inf:
        raise InvalidRowError(f"{COST_USD} = {shown(value)}, must be a finite number, 0 or more")
    return number


def is_grade(value: object) -> bool:
    """Whether the value is a grade or a missing grade."""
    return _is_missing(value) or 0.0 <= _number(value) <= 1.0


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _MISSING)


def _number(value: object) -> float:
    """The value as a number, NaN if it is not one."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _WORDS:
            return _WORDS[word]
    elif not isinstance(value, bool | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
