"""Finds the fenced code blocks of an answer in Markdown."""

from __future__ import annotations

from typing import NamedTuple

_MARKS = ("```", "~~~")
_MAX_INDENT = 3


class Fence(NamedTuple):
    language: str  # in lower case, empty if none is named
    text: str


class _Opened(NamedTuple):
    mark: str
    language: str
    start: int  # offset of its text in the answer


def fences(answer: str) -> list[Fence]:
    """The fenced blocks in order. A fence that is never closed, as in a truncated answer, extends to the end.

    Runs in time proportional to the answer's length.
    """
    found: list[Fence] = []
    opened: _Opened | None = None
    at = 0
    for line in answer.split("\n"):
        mark, rest = _marked(line)
        end = min(at + len(line) + 1, len(answer))
        if opened is None:
            if mark and "`" not in rest:
                language = rest.lstrip(" \t")
                opened = _Opened(mark, language.split()[0].lower() if language.strip() else "", end)
        elif mark.startswith(opened.mark) and not rest.strip():
            found.append(Fence(opened.language, answer[opened.start : at]))
            opened = None
        at = end
    if opened is not None:
        found.append(Fence(opened.language, answer[opened.start :]))
    return found


def _marked(line: str) -> tuple[str, str]:
    """A line's leading run of at least three backticks or tildes, and the rest; two empty strings if it has none."""
    text = line.lstrip(" \t")
    if len(line) - len(text) > _MAX_INDENT or not text.startswith(_MARKS):
        return "", ""
    rest = text.lstrip(text[0])
    return text[: len(text) - len(rest)], rest
