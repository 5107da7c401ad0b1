"""Server-sent events, as bytes: split where they end, and otherwise left as they are.

Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 16 << 20  # a whole response with its images is one event
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_END_BYTES = 4


class EventSplitter:
    """Events out of the pieces of a stream, wherever it was cut. Each byte is looked at once."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._held, self._seen = bytearray(), 0  # the first `_seen` bytes hold no end of an event

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that are complete now, each with the blank line that ends it, up to one that is too long."""
        self._held += piece
        events: list[bytes] = []
        start = 0
        while (end := _END.search(self._held, max(start, self._seen))) and end.end() - start <= self.max_bytes:
            events.append(bytes(self._held[start : end.end()]))
            start = end.end()
        del self._held[:start]
        self._seen = max(len(self._held) - _END_BYTES + 1, 0)
        return events

    @property
    def is_too_long(self) -> bool:
        """Has the event that comes next more than `max_bytes`?"""
        return len(self._held) > self.max_bytes

    @property
    def rest(self) -> bytes:
        """The event that has not ended."""
        return bytes(self._held)


def data_of(event: bytes) -> bytes:
    """What an event carries; nothing where it is a comment, which only keeps the connection alive."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b" ") for line in lines)


def has_plain_words(event: bytes) -> bool:
    """Does an event carry what is no JSON object, nor a stream's end? Some upstreams put errors so among an answer."""
    if b"data: {" in event:
        return False
    data = data_of(event).strip()
    return bool(data) and not data.startswith(b"{") and data != b"[DONE]"
