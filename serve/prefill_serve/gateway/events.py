"""Server-sent events, as bytes: split where they end, and otherwise left as they are.

Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import re

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class EventSplitter:
    """Events out of the pieces of a stream, wherever it was cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that are complete now, each with the blank line that ends it."""
        self._rest += piece
        events, start = [], 0
        for end in _END.finditer(self._rest):
            events.append(self._rest[start : end.end()])
            start = end.end()
        self._rest = self._rest[start:]
        return events


def data_of(event: bytes) -> bytes:
    """What an event carries; nothing where it is a comment, which only keeps the connection alive."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b" ") for line in lines)
