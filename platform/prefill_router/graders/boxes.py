r"""Finds the last `\boxed{...}` of an answer, the mark of a final answer in mathematics. Braces may nest."""

from __future__ import annotations

import re
from typing import NamedTuple

_OPEN = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Box(NamedTuple):
    content: str
    end: int  # offset in the text just after the box


def last_box(text: str) -> Box | None:
    """The last box, or None if there is none or it is never closed."""
    opened = list(_OPEN.finditer(text))
    if not opened:
        return None
    start, depth = opened[-1].end(), 1
    for i, character in enumerate(text[start:], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return Box(text[start:i], i + 1)
    return None
