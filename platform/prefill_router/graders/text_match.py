"""The graders `exact`, `normalized` and `regex`, which compare an answer with a reference or a pattern."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import regex
from pydantic import AfterValidator

from prefill_router.graders.grade import Grade, Row, missing, references, right, short, without_reference, wrong
from prefill_router.graders.registry import grader

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGN = re.compile(r"(?<!\w)-(?=\.?\d)")
_PATTERN_S = 1.0  # time limit per answer: a pattern may backtrack for ever


@grader("exact", unfit=without_reference)
def exact(answer: str, row: Row, *, reference: str = "reference") -> Grade:
    """Requires the exact reference, except for white space around it."""
    return _compared(answer.strip(), [str(r).strip() for r in references(row, reference)])


@grader("normalized", unfit=without_reference)
def normalized(answer: str, row: Row, *, reference: str = "reference", anywhere: bool = False) -> Grade:
    """Compares regardless of case, white space, punctuation, articles and Unicode compatibility forms.

    `anywhere` accepts an answer that contains the reference's words in a row, which favours long answers.
    """
    said, wanted = normalize(answer), [normalize(str(r)) for r in references(row, reference)]
    if anywhere and any(w and f" {w} " in f" {said} " for w in wanted):
        return right("contains the reference")
    return _compared(said, wanted)


def normalize(text: str) -> str:
    """The normal form for comparison. Text of only punctuation, or only articles, keeps it.

    A number keeps its sign, and the punctuation between its digits except thousands separators.
    """
    return _settled(_without_articles, _settled(_plain, _folded(text)))


def _settled(change: Callable[[str], str], text: str) -> str:
    """Applies `change` until it changes nothing more, or would leave nothing: a removal may join two other parts."""
    while (changed := change(text)) and changed != text:
        text = changed
    return text


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _plain(text: str) -> str:
    return _folded("".join(_without_punctuation(_THOUSANDS.sub("", text))))


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _without_punctuation(text: str) -> list[str]:
    signs = {match.start() for match in _SIGN.finditer(text)}
    kept = []
    for i, character in enumerate(text):
        category = unicodedata.category(character)
        inside_number = 0 < i < len(text) - 1 and text[i - 1].isdigit() and text[i + 1].isdigit()
        if not category.startswith("P") or i in signs or inside_number:
            kept.append(character)
        elif category in ("Pd", "Pc") or character == "/":  # these separate words
            kept.append(" ")
    return kept


def compiled(pattern: str) -> Any:
    """The compiled pattern. Raises ValueError with the position of a syntax error."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None


def _unfit_pattern(row: Row, options: Mapping[str, Any]) -> str | None:
    reference = options["reference"]
    if (reason := without_reference(row, options)) or options["pattern"] is not None:
        return reason
    try:
        for pattern in references(row, reference):
            compiled(str(pattern))
    except ValueError as error:
        return f"{reference} {error}"
    return None


@grader("regex", unfit=_unfit_pattern)
def matches(
    answer: str,
    row: Row,
    *,
    reference: str = "reference",
    pattern: Annotated[str, AfterValidator(lambda p: compiled(p).pattern)] | None = None,
) -> Grade:
    """Searches the answer with a pattern. With `pattern`, its last match (or first group) must equal the reference.

    Without it, each reference is itself a pattern, and one must match somewhere. After a second the grade is missing.
    """
    wanted = [str(r) for r in references(row, reference)]
    try:
        return _by_rows(answer, wanted) if pattern is None else _by_pattern(answer, pattern, wanted)
    except TimeoutError:
        return missing(f"the pattern took more than {_PATTERN_S:g} s")


def _by_rows(answer: str, patterns: list[str]) -> Grade:
    for pattern in patterns:
        if compiled(pattern).search(answer, timeout=_PATTERN_S):
            return right(f"found {short(pattern)}")
    return wrong(f"found none of {short(', '.join(patterns))}")


def _by_pattern(answer: str, pattern: str, wanted: list[str]) -> Grade:
    found = list(compiled(pattern).finditer(answer, timeout=_PATTERN_S))
    if not found:
        return wrong("the pattern is not in the answer")
    said = found[-1][1] if found[-1].re.groups else found[-1][0]
    return _compared((said or "").strip(), [w.strip() for w in wanted])


def _compared(said: str, wanted: list[str]) -> Grade:
    if said in wanted:
        return right()
    return wrong(f"{short(said) or 'nothing'} is not {short(wanted[0])}")
