"""Reads and writes Parquet files, so that neither a large row group nor a large dictionary fills the memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from prefill_router.common.errors import UserError, one_line
from prefill_router.storage import uris

BATCH_ROWS = 1024
BATCH_BYTES = 64 << 20  # encoded size of a batch: Arrow fails on nested columns of 2 GB
_UNPACKED_BYTES = 256 << 20  # size of a batch in the worst case, where each row holds its column's whole dictionary
_GROUP_BYTES, _PIECE_BYTES = 256 << 20, 8 << 20  # row groups above the first size are fetched in pieces of the second
_HEADER_BYTES = 16
_DICTIONARY_PAGE = bytes([0x15, 0x04, 0x15])  # Thrift: field 1, the type, is 2; field 2, the size, follows
_WRITE_AGAIN = "write it again"  # the remedy for a damaged file


def encode_parquet(table: pa.Table, dictionaries: Sequence[str] = ()) -> bytes:
    """Encodes a table as one Parquet file, with dictionary encoding for the columns `dictionaries` only."""
    sink = io.BytesIO()
    # Dictionaries never pay for activations, and cost a pass over them.
    pq.write_table(table, sink, compression="zstd", use_dictionary=list(dictionaries))
    return sink.getvalue()


def read_table(uri: str, columns: Sequence[str] | None = None, remedy: str = _WRITE_AGAIN) -> pa.Table:
    """Reads one Parquet file, or only `columns` of it. Raises UserError, ending in `remedy`, if it is damaged."""
    with damage(uri, remedy), open_parquet(uri) as file:
        return file.read(columns=None if columns is None else list(columns))


def open_parquet(uri: str) -> pq.ParquetFile:
    """Opens a file for reading one row group at a time; large groups are fetched in pieces. Read it under `damage`.

    Raises UserError if it is not a Parquet file.
    """
    fs, path = uris.resolve(uri)
    source = path if isinstance(fs, LocalFileSystem) else fs.open(path, "rb", cache_type="none")
    with damage(uri):
        try:
            file = pq.ParquetFile(source, pre_buffer=True)
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            if max(map(_stored_bytes, groups), default=0) > _GROUP_BYTES:
                file = pq.ParquetFile(source, buffer_size=_PIECE_BYTES, pre_buffer=False, metadata=file.metadata)
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: not a Parquet file: {one_line(error)}: {_WRITE_AGAIN}") from None
    return file


@contextmanager
def damage(uri: str, remedy: str = _WRITE_AGAIN) -> Iterator[None]:
    """Turns Arrow's errors about the file at `uri` into UserErrors; failures of the storage pass through."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if uris.is_failure_of_storage(error):
            raise
        raise UserError(f"{uri}: is damaged, or holds an unsupported type: {one_line(error)}: {remedy}") from None


def _stored_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


# --- size of a batch ---------------------------------------------------------------------------------------------


def batch_rows(uri: str, group: pq.RowGroupMetaData, columns: Sequence[str], most: int = BATCH_ROWS) -> int:
    """The number of rows of a row group, from 1 to `most`, whose `columns` fit into memory as one batch.

    A dictionary stores a value once, however many rows hold it: a file of a kilobyte may unpack to gigabytes.
    """
    rows = int(group.num_rows)
    most = max(1, min(most, BATCH_BYTES * rows // max(int(group.total_byte_size), 1)))
    chunks = [group.column(i) for i in range(group.num_columns)]
    read = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns and chunk.has_dictionary_page]
    unpacked = sum(_unpacked_bytes(uri, chunk, most, rows) for chunk in read)
    return max(1, min(most, _UNPACKED_BYTES * rows // max(unpacked, 1)))


def _unpacked_bytes(uri: str, chunk: pq.ColumnChunkMetaData, most: int, rows: int) -> int:
    """An upper bound for a column's size in memory: each of its values is the whole dictionary."""
    values, size = int(chunk.num_values), int(chunk.total_uncompressed_size)
    if size * most * values <= _UNPACKED_BYTES * rows:  # the usual case: the dictionary's header need not be read
        return size * values
    return min(size, _dictionary_bytes(uri, chunk.dictionary_page_offset) or size) * values


def _dictionary_bytes(uri: str, offset: int) -> int | None:
    """The unpacked size of the dictionary page at `offset`, from its header; None if there is no such page.

    Source: apache/parquet-format, parquet.thrift, PageHeader, in Thrift's compact protocol.
    """
    header = uris.read_range(uri, offset, offset + _HEADER_BYTES)
    if not header.startswith(_DICTIONARY_PAGE):
        return None
    size = 0
    for index, byte in enumerate(header[len(_DICTIONARY_PAGE) :]):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return size >> 1  # zigzag
    return None
