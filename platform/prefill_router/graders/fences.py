"""The fenced blocks of an answer in Markdown."""

from __future__ import annotations

import re
from typing import NamedTuple

_OPEN = re.compile(r"^[ \t]{0,3}(?P<ticks>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^`\n]*$", re.MULTILINE)


class Fence(NamedTuple):
    language: str  # in lower case, empty where none is named
    text: str


def fences(answer: str) -> list[Fence]:
    """In their order. A fence that is never closed, as of an answer that was cut off, goes to the end."""
    found, at = [], 0
    while opened := _OPEN.search(answer, at):
        start = min(opened.end() + 1, len(answer))
        ticks = opened["ticks"]
        closed = re.compile(rf"^[ \t]{{0,3}}{ticks[0]}{{{len(ticks)},}}[ \t]*$", re.MULTILINE).search(answer, start)
        found.append(Fence(opened["language"].lower(), answer[start : closed.start() if closed else len(answer)]))
        if closed is None:
            break
        at = closed.end()
    return found
