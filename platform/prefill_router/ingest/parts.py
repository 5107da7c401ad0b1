"""Writers of tables that grow row by row; only the latest rows are in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from prefill_router import storage
from prefill_router.common.schema import QUARANTINE
from prefill_router.corpus.reader import BadRow
from prefill_router.ingest.records import text
from prefill_router.storage import parquet_objects

_PART_ROWS = 1 << 15
_PART_BYTES = 16 << 20  # of prompts, before compression


class Parts:
    """Writes one table as a sequence of Parquet parts. Calls `before_writing` before each of them."""

    def __init__(self, uri: str, schema: pa.Schema, before_writing: Callable[[], None]) -> None:
        self.uri, self.schema, self._before_writing = uri, schema, before_writing
        self.num_rows = self._num_parts = self._num_bytes = 0
        self._columns: list[list[object]] = [[] for _ in schema]

    def add(self, row: Mapping[str, object], num_bytes: int = 0) -> None:
        """Adds a row, a mapping of column names to values. Columns that the table lacks are dropped."""
        for column, name in zip(self._columns, self.schema.names, strict=True):
            column.append(row.get(name))
        self._num_bytes += num_bytes
        if len(self._columns[0]) >= _PART_ROWS or self._num_bytes >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        num_rows = len(self._columns[0])
        if num_rows:
            self._before_writing()
            parquet_objects.write_shard(self.uri, self._num_parts, pa.table(self._columns, schema=self.schema))
            self.num_rows += num_rows
            self._num_parts += 1
            self._columns, self._num_bytes = [[] for _ in self.schema], 0


class Quarantine:
    """Collects invalid rows as the bytes of one Parquet file."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.first: BadRow | None = None
        self._rows: list[BadRow] = []
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, QUARANTINE, compression="zstd")

    def add(self, bad: BadRow) -> None:
        self.first = self.first or bad
        self.num_rows += 1
        self._rows.append(bad)
        if len(self._rows) >= _PART_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = [(text(bad.uri), *bad[1:]) for bad in self._rows]  # a file's name may be invalid Unicode
        columns = [list(column) for column in zip(*rows, strict=True)]
        self._writer.write_table(pa.table(columns, schema=QUARANTINE))
        self._rows = []

    def write(self, uri: str) -> None:
        """Writes the file if there are any invalid rows."""
        if self._rows:
            self._flush()
        self._writer.close()
        if self.num_rows:
            storage.write_bytes(uri, self._sink.getvalue())
