"""Row keys: 192-bit hashes of a row's prompt_id and prompt, which take less memory than the texts."""

# n rows

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from prefill_router.corpus.reader import Row, id_digest

RowKeys = NDArray[np.uint64]  # (n, 3): per row, 64 bits of its prompt_id and 128 bits of its prompt
KEY_BYTES = 24


def row_keys(prompt_ids: Iterable[str], contents: Iterable[str]) -> RowKeys:
    """The keys (n, 3) of rows, given their ids and the hex of their content digests."""
    keys = bytearray()
    for prompt_id, content in zip(prompt_ids, contents, strict=True):
        keys += id_digest(prompt_id) + bytes.fromhex(content)
    return as_keys(keys)


def keys_of(rows: Iterable[Row]) -> RowKeys:
    return as_keys(b"".join(map(key_of, rows)))


def key_of(row: Row) -> bytes:
    return id_digest(row.prompt_id) + row.content_digest


def as_keys(data: bytes | bytearray) -> RowKeys:
    return np.frombuffer(data, "<u8").reshape(-1, 3)


def as_values(keys: RowKeys) -> NDArray[np.void]:
    """Views keys (n, 3) as n values that numpy can compare."""
    return np.ascontiguousarray(keys).view([("", keys.dtype)] * 3)[:, 0]


def content_hashes(keys: RowKeys) -> list[str]:
    """The content digest of each row, in hexadecimal."""
    return [key.tobytes().hex() for key in keys[:, 1:]]


def have_own_hash(keys: RowKeys) -> NDArray[np.bool_]:
    """Whether each row's prompt_id is the hash of its content."""
    hashes = bytearray()
    for content in content_hashes(keys):
        hashes += id_digest(content)
    return np.asarray(np.frombuffer(hashes, "<u8") == keys[:, 0])


def digest_of(keys: RowKeys) -> str:
    """A digest that identifies these rows in this order."""
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()
