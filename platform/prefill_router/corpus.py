"""A corpus of prompts: Parquet, JSONL or CSV files, read row by row, each row either fit or with the reason why not.

A bad row never ends the reading: in a billion prompts some are null, broken or gigantic, and none of them may cost the
others. What is wrong with a whole file, such as a missing column, is a UserError.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from prefill_router import logged, storage
from prefill_router.compressed import COMPRESSED, open_bytes
from prefill_router.errors import UnfitError, UserError, shown
from prefill_router.schema import MESSAGES, PROMPT, PROMPT_ID

_FORMATS = (".parquet", ".jsonl", ".csv")
SUFFIXES = (*_FORMATS, *(text + packed for text in _FORMATS[1:] for packed in COMPRESSED))
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
_ROLES: tuple[str, ...] = get_args(Role)
MAX_PROMPT_BYTES = 1 << 20

Message = dict[str, str]
Prompt = str | list[Message]  # a bare prompt, or the messages of a conversation


class Row(NamedTuple):
    """One prompt of a corpus; `id_is_hash` where the corpus gave no prompt_id."""

    prompt_id: str
    prompt: Prompt
    id_is_hash: bool
    extras: tuple[Any, ...] = ()  # of the columns that were asked for, None where a row has none

    @property
    def content_digest(self) -> bytes:
        return bytes.fromhex(self.prompt_id) if self.id_is_hash else content_digest(self.prompt)


class BadRow(NamedTuple):
    """A row that holds no prompt that could be encoded; `row` counts from 0 in its file."""

    uri: str
    row: int
    prompt_id: str | None  # None where it was not given, or is what is bad
    reason: str  # one short line: the key, its value, and what it must be

    @property
    def message(self) -> str:
        return f"{self.uri}: row {self.row + 1}: {self.reason}"


def content_digest(prompt: Prompt) -> bytes:
    """16 bytes of SHA-256 that stand for a prompt, whatever its id."""
    text = prompt if isinstance(prompt, str) else _canonical(prompt)
    return hashlib.sha256(text.encode()).digest()[:16]


def content_hash(prompt: Prompt) -> str:
    """The id of a prompt that came without one: its content digest, in hex."""
    return content_digest(prompt).hex()


def _canonical(messages: list[Message]) -> str:
    """What `json.dumps(messages, sort_keys=True, ensure_ascii=False)` gives, in a third of the time."""
    parts = [
        f'{{"content": {encode_basestring(m["content"])}, "role": {encode_basestring(m["role"])}}}' for m in messages
    ]
    return f"[{', '.join(parts)}]"


def id_digest(prompt_id: str) -> bytes:
    """8 bytes that stand for a prompt_id."""
    return hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()


def prompt_hash(prompt_id: str) -> int:
    """64 bits that stand for a prompt where ids would take too much room: in splits and in sets of seen prompts."""
    return int.from_bytes(id_digest(prompt_id), "little")


# --- reading -----------------------------------------------------------------------------------------------------

_BUFFER_BYTES = 1 << 20
_COLUMNS = (PROMPT_ID, PROMPT, MESSAGES)
_ABSENT: Any = object()  # a column that the file, or a key that the row does not have

Fields = tuple[Any, ...]  # prompt_id, prompt, messages, and what else was asked for
Record = tuple[int, int, Fields | str]  # row, byte offset, and the fields or why there are none


def files(uri: str) -> list[str]:
    """The file at `uri`, or those of a corpus at any depth below it, sorted; what `_` or `.` begins is left out."""
    return [file for file in storage.find_files(uri) if file == uri or _belongs(file.removeprefix(uri))]


def refuse_output(out: str, uri: str) -> None:
    """Raises UserError where an output cannot lie: where a file does, or among the files of the corpus at `uri`."""
    storage.refuse_file(out)
    corpus, place = (f"{storage.absolute(folder).rstrip('/')}/" for folder in (uri, out))
    is_left_out = any(part.startswith(("_", ".")) for part in place.removeprefix(corpus).split("/"))
    if place.startswith(corpus) and not is_left_out:
        raise UserError(f"{out}: lies in {uri}, which is read, and so it would be too: choose another place")


def _belongs(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not any(part.startswith("_") for part in path.split("/"))


def read(
    uri: str,
    first_row: int = 0,
    num_rows: int | None = None,
    offset: int = 0,
    max_prompt_bytes: int = MAX_PROMPT_BYTES,
    extras: Sequence[str] = (),
) -> Iterator[tuple[int, int, Row | BadRow]]:
    """Yields (row, offset, what it holds) for every row of one file from `first_row` on, which begins at `offset`.

    A line of JSON may also be a request to an OpenAI-style endpoint (see `logged`). `extras` names further columns, or
    keys of JSON objects as `metadata.team`, whose values the rows carry.

    A row is good where `messages` holds a conversation or, where it is null or absent, `prompt` holds text; where its
    prompt_id, if the corpus gives any, is a string; and where none of them is empty, has more than `max_prompt_bytes`
    in UTF-8 or is not Unicode. White space alone is no prompt. Rows count from 0, blank lines not among them.

    Raises UserError where the file as a whole cannot be read: another format than its suffix says, no column with
    prompts, a CSV whose quotes do not match.
    """
    suffix = next((suffix for suffix in SUFFIXES if uri.lower().endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{uri}: a corpus is one of {', '.join(SUFFIXES)}")
    # Escapes may make a prompt six times as long, and other fields stand beside it.
    max_line_bytes = 16 * max(max_prompt_bytes, MAX_PROMPT_BYTES)
    columns = (*_COLUMNS, *extras)
    records = _READERS["." + suffix.split(".")[1]](uri, columns, first_row, offset, max_line_bytes)
    for row, position, fields in itertools.islice(records, num_rows):
        yield row, position, _checked(fields, uri, row, max_prompt_bytes)


def _read_parquet(uri: str, names: Sequence[str], first_row: int, _o: int, _m: int) -> Iterator[Record]:
    with storage.open_parquet(uri) as file:
        _check_columns(uri, file.schema_arrow.names)
        columns = [name for name in names if name in file.schema_arrow.names]
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], dtype=np.int64)
        group = int(np.searchsorted(ends, first_row, side="right"))
        skip = first_row - int(ends[group - 1] if group else 0)
        row = first_row
        for g in range(group, len(ends)):  # one at a time: what a reader of several has fetched, it keeps
            for batch in file.iter_batches(batch_size=1024, row_groups=[g], columns=columns):
                unread = batch.slice(min(skip, len(batch)))
                skip -= len(batch) - len(unread)
                for fields in zip(*(column_values(unread, name) for name in names), strict=True):
                    yield row, 0, fields
                    row += 1


_NOT_UTF8 = b"\xff"


def column_values(batch: pa.RecordBatch, name: str) -> list[Any]:
    """The values of a column, of text that is not UTF-8 the bytes."""
    if name not in batch.schema.names:
        return [_ABSENT] * len(batch)
    column = batch.column(name)
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    """The value in Python, as its bytes where it is text that is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if isinstance(scalar, pa.StringScalar) else _NOT_UTF8


def decoded(line: bytes, offset: int) -> str:
    """Bytes that are not UTF-8 become lone surrogates, which no prompt may hold."""
    return line.decode("utf-8" if offset else "utf-8-sig", "surrogateescape")


def _read_jsonl(uri: str, names: Sequence[str], first_row: int, offset: int, max_line_bytes: int) -> Iterator[Record]:
    with open_bytes(uri) as stream:
        stream.seek(offset)
        row = first_row
        for position, line in bounded_lines(stream, offset, max_line_bytes):
            if len(line) == max_line_bytes:
                yield row, position, f"the line must have less than {max_line_bytes:,} bytes"
                row += 1
            elif text := decoded(line, position).strip():
                yield row, position, _json_fields(text, names)
                row += 1


def bounded_lines(stream: io.BufferedReader, offset: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Each line and where it begins, and of a line that could fill the memory no more than `max_bytes`."""
    while line := stream.readline(max_bytes):
        yield offset, line
        offset += len(line)
        rest = line if len(line) == max_bytes else b""
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(_BUFFER_BYTES)
            offset += len(rest)


_JSON = json.JSONDecoder()


def _json_fields(text: str, names: Sequence[str]) -> Fields | str:
    fields = json_object(text, f"a JSON object with {PROMPT} or {MESSAGES}")
    if isinstance(fields, str):
        return fields
    extras = (_at(fields, name) for name in names[len(_COLUMNS) :])
    if not logged.is_request(fields):
        return fields.get(PROMPT_ID, _ABSENT), fields.get(PROMPT, _ABSENT), fields.get(MESSAGES, _ABSENT), *extras
    try:
        prompt, messages, _ = logged.prompt_of(fields)
    except UnfitError as problem:
        return str(problem)
    return fields.get(PROMPT_ID, _ABSENT), prompt, messages, *extras


def _at(fields: dict[str, Any], name: str) -> Any:
    """A value by its key, by the keys that lead to it, as `metadata.team`, or by what a request's log calls it."""
    value: Any = fields
    for key in [name] if name in fields else name.split("."):
        value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
    return logged.extra(fields, name) if value is _ABSENT else value


def json_object(text: str, what: str = "a JSON object") -> dict[str, Any] | str:
    """The object that `text` holds, or why it does not hold `what`.

    `text` is stripped, so that the decoder need not look for space around it, which takes as long as decoding.
    """
    try:
        fields, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if end != len(text):
        return f"not JSON: more than one value: char {end}"
    return fields if isinstance(fields, dict) else f"must be {what}"


class _CsvLines:
    """The lines of a stream as text, and the offset at which the next one begins."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream, self.position = stream, stream.tell()

    def __iter__(self) -> Iterator[str]:
        for line in self.stream:
            start, self.position = self.position, self.position + len(line)
            yield decoded(line, start)


def _read_csv(uri: str, names: Sequence[str], first_row: int, offset: int, _m: int) -> Iterator[Record]:
    csv.field_size_limit(1 << 28)  # prompts may be long, but a quote that is left open takes in the rest of the file
    with open_bytes(uri) as stream:
        lines = _CsvLines(stream)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(filter(None, reader), None)
            if header is None:
                return
            _check_columns(uri, header)
            places = [header.index(name) if name in header else None for name in names]
            if offset:
                stream.seek(offset)
                lines = _CsvLines(stream)
                reader = csv.reader(lines, strict=True)
            row, position = first_row, lines.position
            for values in reader:
                if values:
                    yield row, position, _csv_fields(values, places, len(header))
                    row += 1
                position = lines.position
        except csv.Error as error:
            raise UserError(f"{uri}: near byte {lines.position}: not CSV: {error}") from None


def _csv_fields(values: list[str], places: list[int | None], num_columns: int) -> Fields | str:
    if len(values) != num_columns:
        return f"has {len(values)} values, but the header names {num_columns}: quote a prompt that holds a comma"
    return tuple(_ABSENT if place is None else values[place] or None for place in places)


def _check_columns(uri: str, names: Sequence[str]) -> None:
    if PROMPT not in names and MESSAGES not in names:
        raise UserError(f"{uri}: has neither {PROMPT} nor {MESSAGES} among its columns")
    for name in _COLUMNS:
        if names.count(name) > 1:
            raise UserError(f"{uri}: has {names.count(name)} columns {name}, must have one")


_READERS: dict[str, Callable[[str, Sequence[str], int, int, int], Iterator[Record]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


# --- what a row must hold ----------------------------------------------------------------------------------------


def _checked(fields: Fields | str, uri: str, row: int, max_bytes: int) -> Row | BadRow:
    if isinstance(fields, str):
        return BadRow(uri, row, None, fields)
    try:
        prompt = _prompt(fields[1], fields[2], max_bytes)
        extras = tuple(None if value is _ABSENT else value for value in fields[3:])
        if fields[0] is _ABSENT:
            return Row(content_hash(prompt), prompt, True, extras)
        return Row(fit_text(fields[0], PROMPT_ID, max_bytes), prompt, False, extras)
    except UnfitError as problem:
        return BadRow(uri, row, _readable_id(fields[0], max_bytes), str(problem))


def _prompt(prompt: object, messages: object, max_bytes: int) -> Prompt:
    if messages is not None and messages is not _ABSENT:
        return fit_messages(messages, max_bytes)
    if prompt is _ABSENT:
        raise UnfitError(f"has neither {PROMPT} nor {MESSAGES}")
    return fit_prompt(prompt, max_bytes)


def fit_prompt(value: object, max_bytes: int, key: str = PROMPT) -> str:
    """A bare prompt as text. Raises UnfitError where `value` is none, and calls it `key`."""
    text = fit_text(value, key, max_bytes)
    if text.isspace():
        raise UnfitError(f"{key} = {shown(text)}, must hold more than white space")
    return text


def _readable_id(value: object, max_bytes: int) -> str | None:
    try:
        return fit_text(value, PROMPT_ID, max_bytes)
    except UnfitError:
        return None


def fit_text(value: object, key: str, max_bytes: int) -> str:
    """A text that is not empty. Raises UnfitError where `value` is none, and calls it `key`."""
    if isinstance(value, str) and value.isascii() and 0 < len(value) <= max_bytes:
        return value  # nearly always; what follows takes three times as long
    text = _unicode(value)
    if not isinstance(text, str) or not text:
        raise UnfitError(f"{key} = {shown(text)}, must be a non-empty string")
    size = _num_bytes(text, key)
    if size > max_bytes:
        raise UnfitError(f"{key} = {shown(text)}, has {size:,} bytes, must have at most {max_bytes:,}")
    return text


def _unicode(value: object) -> object:
    """Text of a Parquet column that is not declared as text, or is not UTF-8, comes as bytes."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _num_bytes(text: str, key: str) -> int:
    """The size of a text in UTF-8."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise UnfitError(f"{key} = {shown(text)}, holds half a character or bytes that are not UTF-8") from None


def check_messages(value: object, where: str) -> list[Message]:
    """A conversation as [{"role": ..., "content": ...}], of any size. Raises UserError where it is none."""
    try:
        return fit_messages(value)
    except UnfitError as problem:
        raise UserError(f"{where}: {problem}") from None


def fit_messages(value: object, max_bytes: float = math.inf) -> list[Message]:
    """A conversation as messages of role and content. Raises UnfitError where `value` is none."""
    if value == _NOT_UTF8:
        raise UnfitError(f"{MESSAGES} holds bytes that are not UTF-8")
    if not isinstance(value, list) or not value:
        raise UnfitError(f"{MESSAGES} = {shown(value)}, must be a non-empty list of role and content")
    messages, size = [], 0
    for i, item in enumerate(value):
        message = _message(item, key := f"{MESSAGES}[{i}]")
        messages.append(message)
        size += _num_bytes(message["content"], key)
    if not any(message["content"].strip() for message in messages):
        raise UnfitError(f"{MESSAGES} = {shown(messages)}, must hold more than white space")
    if size > max_bytes:
        raise UnfitError(f"{MESSAGES} = {shown(messages)}, has {size:,} bytes, must have at most {max_bytes:,}")
    return messages


def _message(value: object, key: str) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise UnfitError(f"{key} = {shown(value)}, must have role and content")
    role, content = _unicode(value["role"]), _unicode(value["content"])
    if role not in _ROLES:
        raise UnfitError(f"{key}.role = {shown(role)}, must be one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise UnfitError(f"{key}.content = {shown(content)}, must be a string")
    return {"role": role, "content": content}
