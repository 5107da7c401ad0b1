"""Reads files of every supported corpus format row by row, starting at any row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus.text_files import CsvTable, Record, check_unique, json_object, read_json_list, read_jsonl
from prefill_router.storage.compression import COMPRESSED, open_text, unpacked
from prefill_router.storage.parquet_files import BATCH_ROWS, batch_rows

_BINARY, _TEXT = (".parquet", ".arrow", ".feather"), (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_BINARY, *_TEXT, *(text + packed for text in _TEXT for packed in COMPRESSED))
FORMATS = f"{', '.join(_BINARY + _TEXT)}, and text also in {', '.join(COMPRESSED)}"  # for errors
NOT_UTF8 = b"\xff"  # replaces a nested value whose text is not UTF-8

Choose = Callable[[Sequence[str]], list[str]]  # selects the columns to read from all columns of a table


def is_readable(uri: str) -> bool:
    return uri.lower().endswith(SUFFIXES)


def read_records(uri: str, choose: Choose, first_row: int, offset: int, max_line_bytes: int) -> Iterator[Record]:
    """Yields the rows of a file from `first_row`, which begins at byte `offset`.

    A row of a table has the columns that `choose` selects, a row of JSON all its keys. Rows count from 0 and do not
    include blank lines.
    """
    if not is_readable(uri):
        raise UserError(f"{uri}: unsupported format: use one of {FORMATS}")
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
    """Whether a readable file holds records; a `.json` file with one object over several lines holds metadata."""
    if not unpacked(uri).endswith(".json"):
        return True
    with open_text(uri) as stream:
        begin = stream.peek().decode("utf-8-sig", "surrogateescape").lstrip()
    line, ended, _ = begin.partition("\n")
    return not (begin.startswith("{") and ended and isinstance(json_object(line.strip()), str))


def _is_list(uri: str) -> bool:
    with open_text(uri) as stream:
        return stream.peek().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


# --- columnar tables ---------------------------------------------------------------------------------------------

Batches = Iterator[tuple[int, pa.RecordBatch]]  # the number of a batch's first row, and the batch


def _columnar(uri: str, rows: Callable[..., Batches], choose: Choose, first_row: int) -> Iterator[Record]:
    with storage.damage(uri):
        for start, batch in rows(uri, choose, first_row):
            names = batch.schema.names
            check_unique(uri, names)
            values = [column_values(batch, name) for name in names]
            for row, fields in enumerate(zip(*values, strict=True), start):
                yield row, 0, dict(zip(names, fields, strict=True))


def _parquet_rows(uri: str, choose: Choose, first_row: int) -> Batches:
    with storage.open_parquet(uri) as file:
        columns = choose(file.schema_arrow.names)
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], dtype=np.int64)
        for group in range(int(np.searchsorted(ends, first_row, side="right")), len(ends)):
            # One group at a time: a reader of several keeps all that it has fetched.
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
    """Opens Arrow's file format, which includes Feather, or its stream format, which Hugging Face datasets use."""
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
    """Yields the part of a batch, which begins at `row`, from `first_row` on, unless it is empty."""
    skip = min(max(first_row - row, 0), len(batch))
    if skip < len(batch):
        yield row + skip, batch.slice(skip)


def column_values(batch: pa.RecordBatch, name: str) -> list[Any]:
    """The values of a column; text that is not UTF-8 is returned as bytes."""
    column = batch.column(name)
    try:
        if isinstance(column, pa.DictionaryArray):
            return _shared_values(column)
        is_plain = not column.type.num_fields
        return column.to_pylist() if is_plain else column.to_pylist(maps_as_pydicts="lossy")  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _shared_values(column: pa.DictionaryArray) -> list[Any]:
    """The values of a dictionary column: rows with the same value share one object."""
    indices = column.indices.to_pylist()
    known = {index: column.dictionary[index].as_py() for index in set(indices) if index is not None}
    return [known.get(index) for index in indices]


def _value(scalar: pa.Scalar) -> Any:
    """Converts a value to Python: text that is not UTF-8 to bytes, a nested value with such text to NOT_UTF8."""
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
        chosen = choose(table.columns)
        check_unique(uri, chosen)
        indices = [(name, table.columns.index(name)) for name in chosen]
        for row, position, values in table.records(first_row, offset):
            # A CSV does not distinguish an empty text from a missing one.
            fields = values if isinstance(values, str) else {name: values[i] or None for name, i in indices}
            yield row, position, fields
