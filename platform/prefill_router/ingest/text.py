"""Text files as others write them, read piece by piece: CSV, JSONL, and JSON documents that are one long list.

A row that cannot be read comes as the reason why not. What is wrong with a whole file is a UserError. Bytes that are
not UTF-8 become lone surrogates, as in `corpus`, which no prompt may hold.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, NoReturn

from prefill_router.compressed import open_bytes
from prefill_router.corpus import bounded_lines, decoded, json_object
from prefill_router.errors import UserError

_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 17
_JSON = json.JSONDecoder()
_AFTER_VALUE = tuple(" \t\r\n,:]}")

Fields = dict[str, Any]


# --- CSV ---------------------------------------------------------------------------------------------------------


class CsvTable:
    """The columns of a CSV, and its rows in pieces."""

    def __init__(self, uri: str, stream: io.BufferedReader, max_line_bytes: int) -> None:
        csv.field_size_limit(max_line_bytes)  # a quote that is left open takes in the rest of the file
        self.uri, self.max_line_bytes = uri, max_line_bytes
        self._end = 0  # of what was read, in bytes
        self._reader = csv.reader(self._lines(stream), strict=True)
        self.columns = self._header()

    def _lines(self, stream: io.BufferedReader) -> Iterator[str]:
        for offset, line in bounded_lines(stream, 0, self.max_line_bytes):
            self._end = offset + len(line)
            if len(line) == self.max_line_bytes:
                raise UserError(f"{self.uri}: near byte {offset}: a line must have less than {len(line):,} bytes")
            yield decoded(line, offset)

    def _records(self) -> Iterator[list[str]]:
        try:
            yield from filter(None, self._reader)
        except csv.Error as error:
            raise UserError(f"{self.uri}: near byte {self._end}: not CSV: {error}") from None

    def _header(self) -> list[str]:
        header = next(self._records(), None)
        if header is None:
            raise UserError(f"{self.uri}: is empty: a CSV begins with the names of its columns")
        check_unique(self.uri, header)
        return header

    def rows(self) -> Iterator[tuple[int, Fields | str]]:
        """Each row by its columns' names, or why it has none; they count from 0, without the header."""
        width = len(self.columns)
        for row, values in enumerate(self._records()):
            if len(values) == width:
                yield row, dict(zip(self.columns, values, strict=True))
            else:
                yield row, f"has {len(values)} values, but the header names {width}: quote a prompt that holds a comma"


@contextmanager
def open_csv(uri: str, max_line_bytes: int) -> Iterator[CsvTable]:
    with open_bytes(uri) as stream:
        yield CsvTable(uri, stream, max_line_bytes)


def check_unique(uri: str, columns: Sequence[str]) -> None:
    """Raises UserError where two columns have one name."""
    for name in columns:
        if name and columns.count(name) > 1:
            raise UserError(f"{uri}: has {columns.count(name)} columns {name}, must have one")


def require_columns(uri: str, columns: Sequence[str], required: Sequence[str]) -> None:
    """Raises UserError that names a column that is missing."""
    for name in required:
        if name not in columns:
            raise UserError(f"{uri}: column {name} is missing; it has {_some(columns)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# --- JSON --------------------------------------------------------------------------------------------------------


def read_jsonl(uri: str, max_line_bytes: int) -> Iterator[tuple[int, Fields | str]]:
    """The object in each line that is not blank, or why it holds none."""
    row = 0
    with open_bytes(uri) as stream:
        for offset, line in bounded_lines(stream, 0, max_line_bytes):
            if len(line) == max_line_bytes:
                yield row, f"the line must have less than {max_line_bytes:,} bytes"
                row += 1
            elif text := decoded(line, offset).strip():
                yield row, json_object(text)
                row += 1


class Member(NamedTuple):
    """A value in a JSON document: of an element of a list, its place; of a member of the outer object, its key."""

    key: str | None
    place: int | None
    value: Any


def read_json(uri: str, stream: IO[bytes], max_value_bytes: int) -> Iterator[Member]:
    """The elements of a list; or the members of an object, in whose lists each element comes alone.

    Memory: one value. Raises UserError where the document is not JSON, ends early, or holds a larger value.
    """
    document = _Document(uri, stream, max_value_bytes)
    first = document.peek()
    if first == "[":
        for place, value in enumerate(document.elements()):
            yield Member(None, place, value)
    elif first == "{":
        yield from document.members()
    elif first:
        raise UserError(f"{uri}: must hold a JSON list or object, but begins with {first!r}")
    else:
        raise UserError(f"{uri}: is empty: must hold a JSON list or object")
    if document.peek():
        raise UserError(f"{uri}: not JSON: holds more than one value; if it has one a line, name it .jsonl")


class _Document:
    """The text of a JSON document, of which no more is kept than the value that is being read."""

    def __init__(self, uri: str, stream: IO[bytes], max_value_bytes: int) -> None:
        self.uri, self.stream, self.max_value_bytes = uri, stream, max_value_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False
        self._start = 0  # characters before self._text

    def _read_more(self) -> None:
        """At least as much as is left, so that a long value is not parsed again and again."""
        data = self.stream.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        self._start += self._at
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at, self._ended = 0, not data

    def peek(self) -> str:
        """The next character that is not white space, nothing at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read_more()

    def _take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            self._fail(f"expected {' or '.join(allowed)}")
        self._at += 1
        return found

    def _fail(self, problem: str) -> NoReturn:
        where = "ends early" if self._ended and self._at >= len(self._text) else problem
        raise UserError(f"{self.uri}: near character {self._start + self._at}: not JSON: {where}")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
            except RecursionError:
                self._fail("nested too deep")
            except ValueError as error:
                # It may only be cut off, which cannot be told before the end.
                if self._ended:
                    self._fail(getattr(error, "msg", str(error)))
            else:
                # Of a number that is cut off, the beginning is one too: 1, 1., 1.5, 1.5e.
                if self._ended or self._text[end : end + 1] in _AFTER_VALUE:
                    self._at = end
                    return value
            if len(self._text) - self._at > self.max_value_bytes:
                self._fail(f"a value must have less than {self.max_value_bytes:,} bytes")
            self._read_more()

    def elements(self) -> Iterator[Any]:
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def members(self) -> Iterator[Member]:
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                self._fail("expected a key")
            key = self.value()
            self._take(":")
            if self.peek() == "[":
                for place, value in enumerate(self.elements()):
                    yield Member(key, place, value)
            else:
                yield Member(key, None, self.value())
            if self._take(",}") == "}":
                return
