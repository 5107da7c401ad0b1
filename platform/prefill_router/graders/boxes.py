r"""The last `\boxed{...}` of an answer, whose braces may nest: what mathematics marks a final answer with."""

from __future__ import annotations

import re
from typing import NamedTuple

_OPEN = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Box(NamedTuple):
    content: str
    end: int  # in the text, behind the box


def last_box(text: str) -> Box | None:
    """None where there is no box, or where the last one is never closed."""
    opened = list(_OPEN.finditer(text))
    if not opened:
        return None
    start, depth = opened[-1].end(), 1
    for i, character in enumerate(text[start:], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return Box(text[start:i], i + 1)
    return None
