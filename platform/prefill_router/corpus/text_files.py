"""Reads CSV, JSON Lines and JSON documents in bounded memory.

A malformed row is yielded as the reason why it cannot be read; a problem with a whole file is a UserError. Bytes that
are not UTF-8 become lone surrogates, which are invalid in a prompt.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, NoReturn

from prefill_router.common.errors import UserError
from prefill_router.storage.compression import open_text

_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 17
_JSON = json.JSONDecoder()
_AFTER_VALUE = tuple(" \t\r\n,:]}")
_SPACE = " \t\r\n\ufeff"  # includes the byte order mark
_DELIMITERS = ",;\t|"
_BINARY = {"\0", "\x1f"}  # in UTF-16 without a mark, and in gzip

Fields = dict[str, Any]
Record = tuple[int, int, Fields | str]  # row number, byte where it begins, its fields or why it has none


# --- lines -------------------------------------------------------------------------------------------------------


def decoded(line: bytes, offset: int) -> str:
    """Decodes a line that begins at byte `offset`; bytes that are not UTF-8 become lone surrogates."""
    return line.decode("utf-8" if offset else "utf-8-sig", "surrogateescape")


def bounded_lines(stream: io.BufferedReader, offset: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields each line, cut to `max_bytes`, with the byte where it begins."""
    while line := stream.readline(max_bytes):
        yield offset, line
        offset += len(line)
        rest = line if len(line) == max_bytes else b""
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(_BUFFER_BYTES)
            offset += len(rest)


# --- CSV ---------------------------------------------------------------------------------------------------------


class CsvTable:
    """The columns of a CSV, none if it is empty, and an iterator over its rows.

    The delimiter is the one of comma, semicolon, tab and bar that occurs most often in the header. A row may span many
    lines, but must have less than `max_row_bytes`: an unmatched quote would include the rest of the file.
    """

    def __init__(self, uri: str, stream: io.BufferedReader, max_row_bytes: int) -> None:
        csv.field_size_limit(max_row_bytes)
        self.uri, self.max_row_bytes, self._stream = uri, max_row_bytes, stream
        self._begin = self._end = 0  # the bytes where the current row begins, and up to which the file is read
        header = self._header()
        self._delimiter = max(_DELIMITERS, key=lambda delimiter: _num_columns(header, delimiter))
        self._records = self._parsed(itertools.chain([header], self._lines(self._end)))
        self.columns = [name.strip() for name in next(self._records, [])]

    def _header(self) -> str:
        """Reads the first line that is not blank."""
        for line in self._lines(0):
            if set(line) & _BINARY:
                raise UserError(f"{self.uri}: is not text in UTF-8: write it so, or if it is compressed, name it .gz")
            if line.strip():
                return line
            self._begin = self._end
        return ""

    def _lines(self, offset: int) -> Iterator[str]:
        for start, line in bounded_lines(self._stream, offset, self.max_row_bytes):
            self._end = start + len(line)
            if self._end - self._begin >= self.max_row_bytes:
                raise UserError(
                    f"{self.uri}: near byte {self._begin}: a row must have less than {self.max_row_bytes:,} bytes: "
                    "shorten it, or close its quote"
                )
            yield decoded(line, start)

    def _parsed(self, lines: Iterator[str]) -> Iterator[list[str]]:
        try:
            for values in csv.reader(lines, delimiter=self._delimiter, strict=True):
                self._begin = self._end
                if values:
                    yield values
        except csv.Error as error:
            raise UserError(f"{self.uri}: near byte {self._end}: not CSV: {error}") from None

    def rows(self) -> Iterator[Record]:
        """Yields each row as a dict by column name, or why it is malformed; rows count from 0, without the header."""
        for row, position, values in self.records():
            yield row, position, values if isinstance(values, str) else dict(zip(self.columns, values, strict=True))

    def records(self, first_row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, list[str] | str]]:
        """Yields each row's number, the byte where it begins, and its values or why it is malformed.

        Starts at `first_row`, which begins at byte `offset`.
        """
        width = len(self.columns)
        records = self._records
        if offset:
            self._stream.seek(offset)
            self._begin = self._end = offset
            records = self._parsed(self._lines(offset))
        position = self._end
        for row, values in enumerate(records, first_row):
            if len(values) == width:
                yield row, position, values
            else:
                reason = f"has {len(values)} values, but the header names {width}: quote a prompt that holds a comma"
                yield row, position, reason
            position = self._end


def _num_columns(header: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=delimiter, strict=True), []))
    except csv.Error:
        return 0


@contextmanager
def open_csv(uri: str, max_row_bytes: int) -> Iterator[CsvTable]:
    """Opens a CSV. Raises UserError if it is empty, or if two columns have the same name."""
    with open_text(uri) as stream:
        table = CsvTable(uri, stream, max_row_bytes)
        if not table.columns:
            raise UserError(f"{uri}: is empty: a CSV must begin with the names of its columns")
        check_unique(uri, table.columns)
        yield table


def check_unique(uri: str, columns: Sequence[str]) -> None:
    """Raises UserError if two columns have the same name."""
    for name, number in Counter(filter(None, columns)).items():
        if number > 1:
            raise UserError(f"{uri}: has {number} columns {name}, must have one")


def require_columns(uri: str, columns: Sequence[str], required: Sequence[str]) -> None:
    """Raises UserError if a required column is missing."""
    for name in required:
        if name not in columns:
            raise UserError(f"{uri}: column {name} is missing; it has {_some(columns)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# --- JSON --------------------------------------------------------------------------------------------------------


def read_jsonl(uri: str, max_line_bytes: int, first_row: int = 0, offset: int = 0) -> Iterator[Record]:
    """Yields the object in each line that is not blank, or why it is malformed. `first_row` begins at byte `offset`."""
    row = first_row
    with open_text(uri) as stream:
        stream.seek(offset)
        for position, line in bounded_lines(stream, offset, max_line_bytes):
            if len(line) == max_line_bytes:
                yield row, position, f"the line must have less than {max_line_bytes:,} bytes"
                row += 1
            elif text := decoded(line, position).strip():
                yield row, position, json_object(text)
                row += 1


def json_object(text: str) -> Fields | str:
    """Parses one object, or returns why it is malformed.

    `text` must be stripped: the decoder would take as long to skip white space as to decode.
    """
    try:
        fields, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if end != len(text):
        return f"not JSON: more than one value: char {end}"
    return fields if isinstance(fields, dict) else "must be a JSON object"


def read_json_list(uri: str, max_value_bytes: int, first_row: int = 0, offset: int = 0) -> Iterator[Record]:
    """Yields the objects of a JSON list, or why an element is not an object. `first_row` begins at byte `offset`."""
    with open_text(uri) as stream:
        stream.seek(offset)
        document = _Document(uri, stream, max_value_bytes, offset)
        elements = document.elements(is_begun=offset > 0)
        for row, (position, value) in enumerate(elements, first_row):
            yield row, position, value if isinstance(value, dict) else "must be a JSON object"
        document.end()


class Member(NamedTuple):
    """A value in a JSON document, with its key in the outer object and its index in a list."""

    key: str | None
    place: int | None
    value: Any


def read_json(uri: str, stream: IO[bytes], max_value_bytes: int) -> Iterator[Member]:
    """Yields the elements of a list, or the members of an object; a member that is a list is yielded by element.

    Keeps one value in memory. Raises UserError if the document is not JSON, ends early, or has a larger value.
    """
    document = _Document(uri, stream, max_value_bytes)
    first = document.peek()
    if first == "[":
        for index, (_, value) in enumerate(document.elements()):
            yield Member(None, index, value)
    elif first == "{":
        yield from document.members()
    elif first:
        raise UserError(f"{uri}: must hold a JSON list or object, but begins with {first!r}")
    else:
        raise UserError(f"{uri}: is empty: must hold a JSON list or object")
    document.end()


class _Document:
    """An incremental JSON parser that buffers only the value that is being read."""

    def __init__(self, uri: str, stream: IO[bytes], max_value_bytes: int, offset: int = 0) -> None:
        self.uri, self.stream, self.max_value_bytes = uri, stream, max_value_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False
        self._start = 0  # characters before self._text
        self._counted, self._counted_bytes = 0, offset  # position in self._text, and its byte in the file

    def _read_more(self) -> None:
        """Reads at least as much as is buffered, so that a long value is not parsed many times."""
        data = self.stream.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        self._count()
        self._start += self._at
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at, self._counted, self._ended = 0, 0, not data

    def _count(self) -> int:
        """The byte at which the next character begins."""
        new = self._text[self._counted : self._at]
        self._counted_bytes += len(new) if new.isascii() else len(new.encode("utf-8", "surrogateescape"))
        self._counted = self._at
        return self._counted_bytes

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
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
                # The value may be incomplete, unless the file has ended.
                if self._ended:
                    self._fail(getattr(error, "msg", str(error)))
            else:
                # An incomplete number may parse as a shorter one: 1, 1.5 of 1.5e3.
                if self._ended or self._text[end : end + 1] in _AFTER_VALUE:
                    self._at = end
                    return value
            if len(self._text) - self._at > self.max_value_bytes:
                self._fail(f"a value must have less than {self.max_value_bytes:,} bytes")
            self._read_more()

    def elements(self, *, is_begun: bool = False) -> Iterator[tuple[int, Any]]:
        """Yields each element with the byte where it begins."""
        if not is_begun:
            self._take("[")
            if self.peek() == "]":
                self._take("]")
                return
        while True:
            self.peek()
            yield self._count(), self.value()
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
                for index, (_, value) in enumerate(self.elements()):
                    yield Member(key, index, value)
            else:
                yield Member(key, None, self.value())
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Raises UserError if the file has more after the document."""
        if self.peek():
            raise UserError(f"{self.uri}: not JSON: has more than one value: if it has one per line, name it .jsonl")
