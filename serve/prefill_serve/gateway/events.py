"""Splits a byte stream into server-sent events and leaves their bytes unchanged.

Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import re

from prefill_router.upstreams.transport import MAX_ANSWER_BYTES

MAX_EVENT_BYTES = MAX_ANSWER_BYTES
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_END_BYTES = 4


class EventSplitter:
    """Splits events out of arbitrary chunks of a stream. Scans each byte once."""

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._held, self._seen = bytearray(), 0  # no event ends within the first `_seen` bytes

    def feed(self, piece: bytes) -> list[bytes]:
        """Returns the events now complete, each with its final blank line, up to one that is too long."""
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
        """Whether the next event exceeds `max_bytes`."""
        return len(self._held) > self.max_bytes

    @property
    def rest(self) -> bytes:
        """The incomplete event so far."""
        return bytes(self._held)


def data_of(event: bytes) -> bytes:
    """The data of an event; empty for a comment, which only keeps the connection alive."""
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b" ") for line in lines)


def is_keep_alive(event: bytes) -> bool:
    """Whether an event is a comment or a ping of Anthropic's protocol, which say that an upstream is still at work."""
    return event.startswith((b":", b"event: ping"))


def has_plain_words(event: bytes) -> bool:
    """Whether an event's data is neither a JSON object nor [DONE]; some upstreams put error text into a stream."""
    if b"data: {" in event:
        return False
    data = data_of(event).strip()
    return bool(data) and not data.startswith(b"{") and data != b"[DONE]"
