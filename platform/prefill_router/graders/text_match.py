"""Graders of a text that is compared with a reference, or with a pattern."""

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
_PATTERN_S = 1.0  # for one answer; a pattern may backtrack for ever


@grader("exact", unfit=without_reference)
def exact(answer: str, row: Row, *, reference: str = "reference") -> Grade:
    """The reference to the letter, but for space around it."""
    return _compared(answer.strip(), [str(r).strip() for r in references(row, reference)])


@grader("normalized", unfit=without_reference)
def normalized(answer: str, row: Row, *, reference: str = "reference", anywhere: bool = False) -> Grade:
    """The reference but for case, space, punctuation, articles and Unicode's compatible forms.

    `anywhere` takes an answer that holds the reference's words in a row, which a long answer does sooner than a short.
    """
    said, wanted = normalize(answer), [normalize(str(r)) for r in references(row, reference)]
    if anywhere and any(w and f" {w} " in f" {said} " for w in wanted):
        return right("holds the reference")
    return _compared(said, wanted)


def normalize(text: str) -> str:
    """What is left for a comparison; of a text that is nothing but punctuation and articles, these are.

    What carries a number's meaning stays: its sign, and punctuation between two digits other than of thousands.
    """
    return _settled(_without_articles, _settled(_plain, _folded(text)))


def _settled(change: Callable[[str], str], text: str) -> str:
    """`change` made until nothing is left to change, or to keep: what is taken out may bring two others together."""
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
        elif category in ("Pd", "Pc") or character == "/":  # these part words, the others only close them
            kept.append(" ")
    return kept


def compiled(pattern: str) -> Any:
    """Raises ValueError with the place of the fault."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"is no regular expression: {error}") from None


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
    pattern: Annotated[str | None, AfterValidator(lambda p: p if p is None else compiled(p).pattern)] = None,
) -> Grade:
    """With a `pattern`: the last place that it finds (its first group, if it has one) is the reference.

    Without: the reference is a pattern that the answer must hold. One that takes longer than a second grades nothing.
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
