"""Text files as others write them, read piece by piece: CSV, JSON by lines, and JSON documents that are one long list.

A row that cannot be read comes as the reason why not. What is wrong with a whole file is a UserError. Bytes that are
not UTF-8 become lone surrogates, which no prompt may hold.
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
_SPACE = " \t\r\n\ufeff"  # with the mark that some writers begin a file with
_DELIMITERS = ",;\t|"

Fields = dict[str, Any]
Record = tuple[int, int, Fields | str]  # a row, the byte where it begins, and its fields or why there are none


# --- lines -------------------------------------------------------------------------------------------------------


def decoded(line: bytes, offset: int) -> str:
    """Bytes that are not UTF-8 become lone surrogates."""
    return line.decode("utf-8" if offset else "utf-8-sig", "surrogateescape")


def bounded_lines(stream: io.BufferedReader, offset: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Each line and where it begins, and of a line that could fill the memory no more than `max_bytes`."""
    while line := stream.readline(max_bytes):
        yield offset, line
        offset += len(line)
        rest = line if len(line) == max_bytes else b""
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(_BUFFER_BYTES)
            offset += len(rest)


# --- CSV ---------------------------------------------------------------------------------------------------------


class CsvTable:
    """The columns of a CSV, none where it is empty, and its rows in pieces.

    What keeps columns apart is what the header has most of: commas, semicolons, tabs or bars. A row, whose quoted
    values may have many lines, has less than `max_row_bytes`: a quote that is left open takes in the rest of the file.
    """

    def __init__(self, uri: str, stream: io.BufferedReader, max_row_bytes: int) -> None:
        csv.field_size_limit(max_row_bytes)
        self.uri, self.max_row_bytes, self._stream = uri, max_row_bytes, stream
        self._begin = self._end = 0  # of the row that is read, and of what was read, in bytes
        header = self._header()
        self._delimiter = max(_DELIMITERS, key=lambda delimiter: _num_columns(header, delimiter))
        self._records = self._parsed(itertools.chain([header], self._lines(self._end)))
        self.columns = [name.strip() for name in next(self._records, [])]

    def _header(self) -> str:
        """The first line that is not blank."""
        for line in self._lines(0):
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
                    "shorten it, or close the quote that takes in the rows behind it"
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
        """Each row by its columns' names, or why it has none; they count from 0, without the header."""
        for row, position, values in self.records():
            yield row, position, values if isinstance(values, str) else dict(zip(self.columns, values, strict=True))

    def records(self, first_row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, list[str] | str]]:
        """Each row, the byte where it begins, and its values or why it has none. `first_row` begins at `offset`."""
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
    """Raises UserError where the file is empty, or two columns have one name."""
    with open_text(uri) as stream:
        table = CsvTable(uri, stream, max_row_bytes)
        if not table.columns:
            raise UserError(f"{uri}: is empty: a CSV begins with the names of its columns")
        check_unique(uri, table.columns)
        yield table


def check_unique(uri: str, columns: Sequence[str]) -> None:
    """Raises UserError where two columns have one name."""
    for name, number in Counter(filter(None, columns)).items():
        if number > 1:
            raise UserError(f"{uri}: has {number} columns {name}, must have one")


def require_columns(uri: str, columns: Sequence[str], required: Sequence[str]) -> None:
    """Raises UserError that names a column that is missing."""
    for name in required:
        if name not in columns:
            raise UserError(f"{uri}: column {name} is missing; it has {_some(columns)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# --- JSON --------------------------------------------------------------------------------------------------------


def read_jsonl(uri: str, max_line_bytes: int, first_row: int = 0, offset: int = 0) -> Iterator[Record]:
    """The object in each line that is not blank, or why it holds none. `first_row` begins at `offset`."""
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
    """The object that `text` holds, or why it holds none.

    `text` is stripped, so that the decoder need not look for space around it, which takes as long as decoding.
    """
    try:
        fields, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if end != len(text):
        return f"not JSON: more than one value: char {end}"
    return fields if isinstance(fields, dict) else "must be a JSON object"


def read_json_list(uri: str, max_value_bytes: int, first_row: int = 0, offset: int = 0) -> Iterator[Record]:
    """The objects of one long list, or why an element is none. `first_row` begins at `offset`."""
    with open_text(uri) as stream:
        stream.seek(offset)
        document = _Document(uri, stream, max_value_bytes, offset)
        elements = document.elements(is_begun=offset > 0)
        for row, (position, value) in enumerate(elements, first_row):
            yield row, position, value if isinstance(value, dict) else "must be a JSON object"
        document.end()


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
        for place, (_, value) in enumerate(document.elements()):
            yield Member(None, place, value)
    elif first == "{":
        yield from document.members()
    elif first:
        raise UserError(f"{uri}: must hold a JSON list or object, but begins with {first!r}")
    else:
        raise UserError(f"{uri}: is empty: must hold a JSON list or object")
    document.end()


class _Document:
    """The text of a JSON document, of which no more is kept than the value that is being read."""

    def __init__(self, uri: str, stream: IO[bytes], max_value_bytes: int, offset: int = 0) -> None:
        self.uri, self.stream, self.max_value_bytes = uri, stream, max_value_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False
        self._start = 0  # characters before self._text
        self._counted, self._counted_bytes = 0, offset  # how far the text was counted in bytes, and how many they are

    def _read_more(self) -> None:
        """At least as much as is left, so that a long value is not parsed again and again."""
        data = self.stream.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        self._count()
        self._start += self._at
        self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        self._at, self._counted, self._ended = 0, 0, not data

    def _count(self) -> int:
        """The byte at which the next character stands."""
        passed = self._text[self._counted : self._at]
        self._counted_bytes += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self._counted = self._at
        return self._counted_bytes

    def peek(self) -> str:
        """The next character that is not white space, nothing at the end."""
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

    def elements(self, *, is_begun: bool = False) -> Iterator[tuple[int, Any]]:
        """Each element and the byte where it begins."""
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
                for place, (_, value) in enumerate(self.elements()):
                    yield Member(key, place, value)
            else:
                yield Member(key, None, self.value())
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Raises UserError where more stands behind what was read."""
        if self.peek():
            raise UserError(f"{self.uri}: not JSON: holds more than one value; if it has one a line, name it .jsonl")
