"""The formats that a corpus may be in, each read row by row from any row on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus.text_files import CsvTable, Record, json_object, read_json_list, read_jsonl
from prefill_router.storage.compression import COMPRESSED, open_text, unpacked
from prefill_router.storage.parquet_files import BATCH_ROWS, batch_rows

_BINARY, _TEXT = (".parquet", ".arrow", ".feather"), (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_BINARY, *_TEXT, *(text + packed for text in _TEXT for packed in COMPRESSED))
FORMATS = f"{', '.join(_BINARY + _TEXT)}, and text also in {', '.join(COMPRESSED)}"  # for errors
NOT_UTF8 = b"\xff"  # in the place of nested text that is not UTF-8

Choose = Callable[[Sequence[str]], list[str]]  # of a table's columns those to read


def is_readable(uri: str) -> bool:
    return uri.lower().endswith(SUFFIXES)


def read_records(uri: str, choose: Choose, first_row: int, offset: int, max_line_bytes: int) -> Iterator[Record]:
    """Every row of a file from `first_row` on, which begins at `offset`.

    A table gives the columns that `choose` takes of its own, JSON all that an object holds. Rows count from 0, blank
    lines not among them.
    """
    if not is_readable(uri):
        raise UserError(f"{uri}: a corpus is one of {FORMATS}")
    name = unpacked(uri)
    if name.endswith(_BINARY):
        rows = _parquet_rows if name.endswith(".parquet") else _arrow_rows
        return _columnar(uri, rows, choose, first_row)
    if name.endswith((".csv", ".tsv")):
        return _csv(uri, choose, first_row, offset, max_line_bytes)
    if name.endswith(".json") and _is_list(uri):
        return read_json_list(uri, max_line_bytes, first_row, offset)
    return read_jsonl(uri, max_line_bytes, first_row, offset)


def is_of_records(uri: str) -> bool:
    """Does a readable file hold records? Of `.json` files many hold one object, over several lines, about others."""
    if not unpacked(uri).endswith(".json"):
        return True
    with open_text(uri) as stream:
        begin = stream.peek().decode("utf-8-sig", "surrogateescape").lstrip()
    line, ended, _ = begin.partition("\n")
    return not (begin.startswith("{") and ended and isinstance(json_object(line.strip()), str))


def _is_list(uri: str) -> bool:
    with open_text(uri) as stream:
        return stream.peek().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


# --- tables in columns -------------------------------------------------------------------------------------------

Batches = Iterator[tuple[int, pa.RecordBatch]]  # each with the number of its first row


def _columnar(uri: str, rows: Callable[..., Batches], choose: Choose, first_row: int) -> Iterator[Record]:
    with storage.damage(uri):
        for start, batch in rows(uri, choose, first_row):
            names = batch.schema.names
            values = [column_values(batch, name) for name in names]
            for row, fields in enumerate(zip(*values, strict=True), start):
                yield row, 0, dict(zip(names, fields, strict=True))


def _parquet_rows(uri: str, choose: Choose, first_row: int) -> Batches:
    with storage.open_parquet(uri) as file:
        columns = choose(file.schema_arrow.names)
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], dtype=np.int64)
        for group in range(int(np.searchsorted(ends, first_row, side="right")), len(ends)):
            # One at a time: what a reader of several has fetched, it keeps.
            row = int(ends[group - 1]) if group else 0
            size = batch_rows(uri, file.metadata.row_group(group), columns)
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns):
                yield from _from(first_row, row, batch)
                row += len(batch)


def _arrow_rows(uri: str, choose: Choose, first_row: int) -> Batches:
    row = 0
    with _open_arrow(uri) as (schema, batches):
        columns = choose(schema.names)
        for whole in batches:
            if row + len(whole) > first_row:
                chosen = whole.select(columns)
                for start in range(0, len(whole), BATCH_ROWS):
                    yield from _from(first_row, row + start, chosen.slice(start, BATCH_ROWS))
            row += len(whole)


@contextmanager
def _open_arrow(uri: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Arrow's two forms: a file, which Feather is too, and a stream, as Hugging Face's datasets are kept."""
    with storage.open_input(uri) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            file = pa.ipc.open_file(pa.PythonFile(stream, "r"))
            yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            reader = pa.ipc.open_stream(pa.PythonFile(stream, "r"))
            yield reader.schema, iter(reader)


def _from(first_row: int, row: int, batch: pa.RecordBatch) -> Batches:
    """The rest of a batch that begins at `row`."""
    skip = min(max(first_row - row, 0), len(batch))
    if skip < len(batch):
        yield row + skip, batch.slice(skip)


def column_values(batch: pa.RecordBatch, name: str) -> list[Any]:
    """The values of a column, of text that is not UTF-8 the bytes."""
    column = batch.column(name)
    try:
        if isinstance(column, pa.DictionaryArray):
            return _shared_values(column)
        is_plain = not column.type.num_fields
        return column.to_pylist() if is_plain else column.to_pylist(maps_as_pydicts="lossy")  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _shared_values(column: pa.DictionaryArray) -> list[Any]:
    """The values of a column that holds each once: rows with the same value share one object."""
    places = column.indices.to_pylist()
    known = {place: column.dictionary[place].as_py() for place in set(places) if place is not None}
    return [known.get(place) for place in places]


def _value(scalar: pa.Scalar) -> Any:
    """The value in Python, as its bytes where it is text that is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if isinstance(scalar, pa.StringScalar) else NOT_UTF8


# --- CSV ---------------------------------------------------------------------------------------------------------


def _csv(uri: str, choose: Choose, first_row: int, offset: int, max_row_bytes: int) -> Iterator[Record]:
    with open_text(uri) as stream:
        table = CsvTable(uri, stream, max_row_bytes)
        if not table.columns:
            return
        places = [(name, table.columns.index(name)) for name in choose(table.columns)]
        for row, position, values in table.records(first_row, offset):
            # A CSV cannot tell an empty text from none.
            fields = values if isinstance(values, str) else {name: values[i] or None for name, i in places}
            yield row, position, fields
