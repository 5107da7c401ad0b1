"""The `numeric` grader: finds the number that an answer settles on, and compares it within tolerances.

Numbers are decimals: a huge exponent takes no memory, and long integers keep all their digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Context, Decimal, localcontext
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from prefill_router.graders.boxes import last_box
from prefill_router.graders.grade import Grade, Row, lacking, references, right, short, wrong
from prefill_router.graders.registry import grader

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?<![\w.])(?:(?<![)\]}}%])(?P<sign>[-+]))?(?:(?:[$€£¥]|USD|EUR)\s?)?(?P<inner>[-+])?
    (?:\\[dt]?frac\{{(?P<top>-?[\d.]+)\}}\{{(?P<bottom>-?[\d.]+)\}}
      |(?:(?P<whole>\d+)\s)?(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/])
      |(?P<digits>{_DIGITS})
       (?:[eE](?P<e>[-+]?\d{{1,9}})(?!\w)|\s?(?:×|\*|x|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{{?(?P<power>[-+]?\d{{1,9}})\}}?)?
    )(?P<percent>\s?(?:%|percent\b))?""",
    re.VERBOSE,
)
_MARK = re.compile(r"####|\banswer\s*(?:is|was|=|:)+|^[ \t]{0,8}answer\b", re.IGNORECASE | re.MULTILINE)
_PLAIN = str.maketrans({"−": "-", "–": "-", "﹣": "-", "，": ",", "％": "%", "\u00a0": " ", "\u202f": " "})
_LATEX = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{[^{}]*\}|\\[,;!: ]|\^\s*\{?\\circ\}?|\\left|\\right")
_SUM = re.compile(r"[\d\s.,+*/×÷()^$\\{}%-]*=")  # text up to an equals sign, which is not the result
_CONTEXT = Context(prec=60, traps=[])


class Number(NamedTuple):
    value: Decimal  # a percentage as written: 50 for 50 %
    is_percent: bool = False


def _unfit(row: Row, options: Mapping[str, Any]) -> str | None:
    reference = options["reference"]
    if reason := lacking(row, reference):
        return reason
    return None if _numbers_of(row, reference) else f"the {reference} {short(row[reference])} is not a number"


@grader("numeric", unfit=_unfit)
def numeric(
    answer: str,
    row: Row,
    *,
    reference: str = "reference",
    absolute: Annotated[float, Field(ge=0.0)] = 0.0,
    relative: Annotated[float | None, Field(ge=0.0)] = None,
) -> Grade:
    """Compares within `absolute`, or within `relative` times the reference (default 1e-9, or 0 for whole numbers).

    If only one of the two is a percentage, 50 % equals both 50 and 0.5.
    """
    wanted = _numbers_of(row, reference)
    said = find_number(answer)
    if said is None:
        return wrong("no number in the answer")
    if any(_is_near(said, number, absolute, relative) for number in wanted):
        return right(f"{said.value:g}")
    return wrong(f"{short(f'{said.value:g}')} is not {short(f'{wanted[0].value:g}')}")


def _numbers_of(row: Row, reference: str) -> list[Number]:
    return [number for r in references(row, reference) if (number := find_number(_text(r)))]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _is_near(said: Number, wanted: Number, absolute: float, relative: float | None) -> bool:
    with localcontext(_CONTEXT):
        values = [said.value]
        if said.is_percent != wanted.is_percent:
            values.append(said.value / 100 if said.is_percent else said.value * 100)
        return any(abs(value - wanted.value) <= _tolerance(value, wanted.value, absolute, relative) for value in values)


def _tolerance(value: Decimal, wanted: Decimal, absolute: float, relative: float | None) -> Decimal:
    if relative is None:
        relative = 0.0 if _is_whole(value) and _is_whole(wanted) else 1e-9
    return max(Decimal(absolute), Decimal(relative) * abs(wanted))


def _is_whole(value: Decimal) -> bool:
    return value.as_tuple().exponent == 0  # by notation: 1e23 and 5.0 count as measurements


def find_number(text: str) -> Number | None:
    """The number in the last box, else after the last mark ("####", "answer is"), else the last number of the text.

    After a mark, the first number of the line counts, or the result of a calculation, such as 3 + 4 = 7.
    """
    text = text.translate(_PLAIN)
    box, marks = last_box(text), list(_MARK.finditer(text))
    if box is not None and not (marks and marks[-1].start() > box.end and _numbers(text[marks[-1].end() :])):
        return _only(box.content)
    ends = [*(mark.start() for mark in marks[1:]), len(text)][: len(marks)]
    for mark, end in zip(reversed(marks), reversed(ends), strict=True):
        if found := _stated(text[mark.end() : end]):
            return found
    found_anywhere = _numbers(_LATEX.sub(" ", text))
    return found_anywhere[-1] if found_anywhere else None


def _stated(text: str) -> Number | None:
    for line in _LATEX.sub(" ", text).splitlines():
        line = _unescaped(line)
        if (found := _result(line, list(_NUMBER.finditer(line)))) and (number := _value(found)):
            return number
    return None


def _result(line: str, numbers: list[re.Match[str]]) -> re.Match[str] | None:
    """The first number after a line's leading calculations, such as "3 + 4 =", or the last if there is none."""
    place = 0
    while place < len(numbers) - 1 and (equals := _SUM.match(line, numbers[place].end())):
        while place < len(numbers) - 1 and numbers[place].end() < equals.end():
            place += 1
    return numbers[place] if numbers else None


def _only(content: str) -> Number | None:
    """The only number in a box, besides a variable and a unit, or None for an expression."""
    content = _unescaped(_LATEX.sub(" ", content)).rpartition("=")[2]
    numbers = list(_NUMBER.finditer(content))
    if len(numbers) != 1 or "\\" in content.replace(numbers[0][0], ""):
        return None
    return _value(numbers[0])


def _numbers(text: str) -> list[Number]:
    return [number for match in _NUMBER.finditer(_unescaped(text)) if (number := _value(match))]


def _unescaped(text: str) -> str:
    return text.replace("\\%", "%").replace("\\$", "$")


def _value(match: re.Match[str]) -> Number | None:
    with localcontext(_CONTEXT):
        if match["top"]:
            value = Decimal(match["top"]) / Decimal(match["bottom"])
        elif match["over"]:
            value = Decimal(match["whole"] or 0) + Decimal(match["over"]) / Decimal(match["under"])
        else:
            exponent = match["e"] or match["power"] or "0"
            value = Decimal(match["digits"].replace(",", "")).scaleb(int(exponent))
        value = -value if "-" in ((match["sign"] or "") + (match["inner"] or "")) else value
        return Number(value, match["percent"] is not None) if value.is_finite() else None
