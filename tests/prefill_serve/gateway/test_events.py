"""Server-sent events, split at any byte."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_serve.gateway.events import EventSplitter, data_of

BITS = st.sampled_from([b"\r", b"\n", b"\r\n", b"data: x", b": alive", b"event: done", b"\xc3\xa9"])
STREAMS = st.lists(BITS, max_size=30).map(b"".join)
LINE = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"))


def split(*pieces: bytes) -> list[bytes]:
    splitter = EventSplitter()
    return [event for piece in pieces for event in splitter.feed(piece)]


@given(STREAMS, st.data())
def test_events_do_not_depend_on_where_a_stream_is_cut(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(bounds)]
    assert split(*pieces) == split(stream)


def test_a_long_event_in_many_pieces_takes_no_longer_than_its_bytes() -> None:
    splitter, event = EventSplitter(), b"data: " + b"x" * (2 << 20) + b"\n\n"
    started_s = time.process_time()
    events = [done for at in range(0, len(event), 1024) for done in splitter.feed(event[at : at + 1024])]
    assert time.process_time() - started_s < 2.0  # 0.02 s; half a minute if each piece were scanned from the start
    assert events == [event]


@given(st.integers(1, 40))
def test_an_event_beyond_the_limit_is_not_held_wherever_it_is_cut(size: int) -> None:
    short, long = b"data: 1\n\n", b"data: 12\n\n"
    splitter, events = EventSplitter(max_bytes=len(short)), []
    stream = short + long + short
    for at in range(0, len(stream), size):
        assert not splitter.is_too_long
        events += splitter.feed(stream[at : at + size])
        if splitter.is_too_long:
            break
    assert splitter.is_too_long
    assert events == [short]


@given(STREAMS)
def test_nothing_is_lost_but_an_event_without_an_end(stream: bytes) -> None:
    events = b"".join(split(stream))
    assert stream.startswith(events)
    assert split(stream + b"\n\n")[: len(split(stream))] == split(stream)


@given(st.lists(st.lists(LINE, min_size=1), min_size=1), st.sampled_from(["\n", "\r\n", "\r"]))
def test_data_of_many_lines_is_read_with_any_line_end(sent: list[list[str]], end: str) -> None:
    events = ["".join(f"data: {line}{end}" for line in lines) + end for lines in sent]
    got = split("".join(events).encode())
    assert [data_of(event).decode() for event in got] == ["\n".join(lines) for lines in sent]


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data:{}\n\n", b"{}"),
        (b"data:  two spaces\n\n", b" two spaces"),
        (b"event: error\nid: 7\nretry: 10\ndata: {}\n\n", b"{}"),
        (b": data: not this\n\n", b""),
        (b"database: no\n\n", b""),
        (b"\n\n", b""),
    ],
)
def test_only_data_lines_carry_data(event: bytes, data: bytes) -> None:
    assert data_of(event) == data


def test_unicode_separators_end_no_line() -> None:
    text = json.dumps("a\u2028b\x85c\x0cd\x1ee", ensure_ascii=False).encode()
    assert data_of(b"data: " + text + b"\n\n") == text
