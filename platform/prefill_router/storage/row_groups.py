"""How many rows of a Parquet row group are read at once, so that a batch has a bounded size in memory.

A dictionary holds a value once, however many rows have it: a file of a kilobyte may unpack to gigabytes. How large a
dictionary is, its page says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefill_router import storage

BATCH_ROWS = 1024
BATCH_BYTES = 64 << 20  # as pages hold values: Arrow reads no nested column of 2 GB at once
_UNPACKED_BYTES = 256 << 20  # where every row has the whole dictionary
_HEADER_BYTES = 16
_DICTIONARY_PAGE = bytes([0x15, 0x04, 0x15])  # Thrift: field 1, the type, is 2; field 2, the size, follows


def batch_rows(uri: str, group: Any, columns: Sequence[str], most: int = BATCH_ROWS) -> int:
    """Rows of a batch of these columns, at least 1, at most `most`. `group` is a row group's metadata."""
    rows = int(group.num_rows)
    most = max(1, min(most, BATCH_BYTES * rows // max(int(group.total_byte_size), 1)))
    chunks = [group.column(i) for i in range(group.num_columns)]
    read = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns and chunk.has_dictionary_page]
    unpacked = sum(_unpacked_bytes(uri, chunk, most, rows) for chunk in read)
    return max(1, min(most, _UNPACKED_BYTES * rows // max(unpacked, 1)))


def _unpacked_bytes(uri: str, chunk: Any, most: int, rows: int) -> int:
    """What a column has at most where each of its values is the whole dictionary."""
    values, size = int(chunk.num_values), int(chunk.total_uncompressed_size)
    if size * most * values <= _UNPACKED_BYTES * rows:  # as of nearly all: its header need not be read
        return size * values
    return min(size, _dictionary_bytes(uri, chunk.dictionary_page_offset) or size) * values


def _dictionary_bytes(uri: str, offset: int) -> int | None:
    """The unpacked size of a dictionary page, by its header; None where there is no such page.

    Source: apache/parquet-format, parquet.thrift, PageHeader, in Thrift's compact protocol.
    """
    header = storage.read_range(uri, offset, offset + _HEADER_BYTES)
    if not header.startswith(_DICTIONARY_PAGE):
        return None
    size = 0
    for place, byte in enumerate(header[len(_DICTIONARY_PAGE) :]):
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return size >> 1  # zigzag
    return None
