"""The `choice` grader: finds the letter that an answer to a multiple-choice question settles on.

An explicit statement ("the answer is C", a box) outranks a letter that is only set apart ("(C)", "**C**"). The last of
several statements counts. A statement that names two letters is ambiguous, and graded wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from prefill_router.graders.boxes import last_box
from prefill_router.graders.grade import Grade, Row, lacking, nested, references, right, short, wrong
from prefill_router.graders.registry import grader
from prefill_router.graders.text_match import normalize

# A letter in its usual forms: C, (C), [C], **C**, $C$, "C". Lower case counts only in brackets or before a full stop.
# All repeats are bounded or possessive, so that the time of a search is linear in the answer's length.
_OPEN, _CLOSE = r"[*_`$\"'“‘\s]{0,12}", r"[*_`$\"'”’]{0,6}"
_LETTER = (
    _OPEN + r"(?:\\text\{|\\mathrm\{)?"
    r"(?:[(\[]\s?(?P<set>[A-Za-z])\s?[)\]]|(?P<bare>(?!I\s+[a-z])[A-Z])(?![\w'’])|(?P<low>[a-z])(?=[\s*]{0,6}(?:[.)]|$)))"
)
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option|solution)\b[^.\n]{0,20}?(?:\bis|\bwould be|\bshould be|:|=)"
    r"|\b(?:choose|select|pick|go with)\b|####)"
    r"(?i:[*_:\s]|the\b|correct\b|option\b|choice\b|letter\b|answer\b|is\b){0,16}" + _LETTER,
    re.MULTILINE,
)
_IS_ANSWER = re.compile(
    rf"(?:\b[Oo]ption|\b[Cc]hoice|\b[Aa]nswer|^|[\s*(]){_LETTER}{_CLOSE}"
    r"\s{1,3}(?:is|would be)\s{1,3}(?:the\s{1,3})?(?:correct|right|best|answer)",
    re.MULTILINE,
)
_SET_APART = re.compile(
    r"[(\[](?P<set>[A-Za-z])[)\]]|\*\*(?P<bold>[A-Za-z])(?:\*\*|[).:](?=\s|\*\*))"
    r"|^[ \t]{0,8}(?P<line>[A-Z])(?:[).:](?=\s|$)|[ \t]{0,8}$)"
    r"|\b(?i:so|thus|therefore|hence|is)\b,?[ \t]{1,3}(?P<end>[A-Z])[.!]?[ \t]{0,8}$",
    re.MULTILINE,
)
_REJECTED_AFTER = re.compile(
    r"[*_\s:)\]]{0,6}(?:(?:is|are|was|would be)\s{1,3}(?:not|wrong|incorrect|false|ruled)\b|isn['’]t\b)"
)
_BEFORE = 12  # characters before a letter that may reject it
_REJECTED_BEFORE = re.compile(r"(?:\bnot|n['’]t|\bneither|\bexcept)[\s*_(\[]*$")
_WHOLE = re.compile(rf"{_LETTER}(?:\s*+[.):][^\n]*+(?:\n[).\s]*+)?|{_CLOSE}[).\s]*+)")
_MORE = re.compile(rf"{_CLOSE}[)\]]?[*_]{{0,2}}\s{{0,3}}(?:,|/|&|\bor\b|\band\b)\s{{0,3}}(?:or\b|and\b)?{_LETTER}")


class Said(NamedTuple):
    """The letters that one statement names, and its offset in the answer."""

    letters: set[str]
    at: int


def _unfit(row: Row, options: Mapping[str, Any]) -> str | None:
    reference, choices = options["reference"], options["choices"]
    if reason := lacking(row, reference):
        return reason
    try:
        texts, labels = _choices(row.get(choices), options["num_choices"])
    except (ValueError, TypeError, KeyError) as error:
        return f"{choices}: {short(error)}"
    wanted = references(row, reference)[0]
    if _letter_of(wanted, texts, labels) is not None:
        return None
    if row.get(choices) is None:
        return f'the row has no "{choices}", and its {reference} {short(wanted)} is not a letter'
    return f"the {reference} {short(wanted)} is not among the {len(labels)} choices"


@grader("choice", unfit=_unfit)
def choice(
    answer: str,
    row: Row,
    *,
    reference: str = "reference",
    choices: str = "choices",
    num_choices: Annotated[int, Field(ge=2, le=26)] = 26,
) -> Grade:
    """Compares the chosen letter with the reference, which is a letter, an index from 0, or the text of a choice.

    `choices` is a column with a list of texts, with ARC's `text` and `label` lists, or with JSON of either. Rows
    without it have `num_choices` choices.
    """
    texts, labels = _choices(row.get(choices), num_choices)
    right_letter = _letter_of(references(row, reference)[0], texts, labels)
    assert right_letter is not None, "only fit rows are graded"
    letters = ascii_uppercase[: len(labels)]
    said = _by_text(answer, texts) or find_letters(answer, letters)
    if len(said) != 1:
        return wrong(f"ambiguous: {' and '.join(sorted(said))}" if said else "no choice in the answer")
    return right(right_letter) if said == {right_letter} else wrong(f"{said.pop()} is not {right_letter}")


def _choices(value: Any, num_choices: int) -> tuple[list[str], list[str]]:
    """The texts of the choices, empty if the row has none, and the labels that a reference may name."""
    value = nested(value)
    if value is None:
        return [], list(ascii_uppercase[:num_choices])
    texts = [str(text) for text in (value["text"] if isinstance(value, Mapping) else value)]
    if len(texts) > len(ascii_uppercase):
        raise ValueError(f"{len(texts)} choices, must be at most {len(ascii_uppercase)}")
    labels = value.get("label") if isinstance(value, Mapping) else None
    return texts, list(ascii_uppercase[: len(texts)] if labels is None else map(str, labels))


def _letter_of(reference: Any, texts: Sequence[str], labels: Sequence[str]) -> str | None:
    letters = ascii_uppercase[: len(labels)]
    name = str(reference).strip()
    bare = name.strip("().* ")
    if isinstance(reference, str) and bare in labels:
        return letters[list(labels).index(bare)]
    if isinstance(reference, str) and len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    if name in texts:
        return letters[list(texts).index(name)]
    if re.fullmatch(r"\d+(\.0)?", name) and float(name) < len(letters):
        return letters[int(float(name))]
    return None


def find_letters(answer: str, letters: str) -> set[str]:
    """The letters of the last statement that names any, else of the last letter set apart, else none."""
    text = answer.strip()
    if whole := _named(_WHOLE.fullmatch(text), letters):
        return whole
    if len(text) == 1 and text.upper() in letters:
        return {text.upper()}
    boxed, found = last_box(text), [*_said(_STATED, text, letters), *_said(_IS_ANSWER, text, letters)]
    if boxed and (inside := _in_box(boxed.content, letters)):
        found.append(Said(inside, boxed.end))
    found = found or _said(_SET_APART, text, letters)
    return max(found, key=lambda said: said.at).letters if found else set()


def _in_box(content: str, letters: str) -> set[str]:
    found = set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z{])", re.sub(r"\\[a-z]+", " ", content)))
    return {letter.upper() for letter in found if letter.upper() in letters}


def _said(pattern: re.Pattern[str], text: str, letters: str) -> list[Said]:
    found = []
    for match in pattern.finditer(text):
        rejected = _REJECTED_AFTER.match(text, match.end()) or _REJECTED_BEFORE.search(
            text[max(0, match.start() - _BEFORE) : match.start()]
        )
        if not rejected and (named := _named(match, letters)):
            found.append(Said(named | _further(text, match.end(), letters), match.end()))
    return found


def _further(text: str, start: int, letters: str) -> set[str]:
    """Letters that continue a statement, as in "A or B"."""
    named: set[str] = set()
    for _ in letters:
        match = _MORE.match(text, start)
        more = _named(match, letters)
        if match is None or not more:
            break
        named, start = named | more, match.end()
    return named


def _named(match: re.Match[str] | None, letters: str) -> set[str]:
    found = [group for group in match.groupdict().values() if group] if match else []
    return {found[0].upper()} & set(letters) if found else set()


def _by_text(answer: str, texts: Sequence[str]) -> set[str]:
    """The choice whose text equals the answer, its box, its last line or the end of its statement."""
    box = last_box(answer)
    lines = answer.strip().splitlines() or [""]
    said = [
        answer,
        box.content if box else "",
        lines[-1],
        re.split(r"\banswer\s*(?:is|:)", answer, flags=re.IGNORECASE)[-1],
    ]
    for text in map(normalize, said):
        if len(text) < 2:  # a single letter is a label, not the text of a choice
            continue
        equal = {letter for letter, known in zip(ascii_uppercase, texts, strict=False) if normalize(known) == text}
        if equal:
            return equal
    return set()
