"""Segments of the commit log: each holds thousands of records, so that a large log is opened in seconds.

The records of a segment are a Parquet file that is named by its checksum. The keys of their rows, which are larger and
rarely needed, are in a second file, 24 bytes per row, so that the keys of one shard can be read on their own.
"""

# n rows of a shard

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.activations import commit_records
from prefill_router.activations.commit_records import Commit
from prefill_router.common.errors import UserError
from prefill_router.common.schema import COMMITS
from prefill_router.corpus.row_keys import KEY_BYTES, RowKeys, as_keys

_RECORDS, _KEYS = ".parquet", ".keys"
_KEYS_SHA256 = b"keys_sha256"
# The columns that the log keeps in memory for each record; `truncated` is rarely needed.
LISTED = [name for name in COMMITS.names if name != "truncated"]
NONE = COMMITS.empty_table().select(LISTED)


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment in the folder `uri`."""

    uri: str
    digest: str
    records: pa.Table

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.records["rows"].to_numpy())

    @cached_property
    def _keys_path(self) -> str:
        return storage.join(self.uri, self.digest + _KEYS)

    def read_keys(self) -> list[RowKeys]:
        """Reads the keys (n, 3) of each shard."""
        data = self._read(0, int(self._ends[-1]))
        if hashlib.sha256(data).hexdigest().encode() != self.records.schema.metadata[_KEYS_SHA256]:
            raise _damaged(self._keys_path)
        return np.split(as_keys(data), self._ends[:-1])

    def _read(self, start: int, end: int) -> bytes:
        try:
            data = storage.read_range(self._keys_path, KEY_BYTES * start, KEY_BYTES * end)
        except FileNotFoundError:
            raise _damaged(self._keys_path) from None
        if len(data) != KEY_BYTES * (end - start):
            raise _damaged(self._keys_path)
        return data

    def find(self, name: str) -> Commit | None:
        """The record `name` with its keys, or None. Requires a segment that was read with all columns."""
        row = pc.index(self.records["name"], name).as_py()
        if row < 0:
            return None
        end = int(self._ends[row])
        start = end - self.records["rows"][row].as_py()
        return commit_records.from_table(self.records, row, as_keys(self._read(start, end)))

    def keep(self, mask: NDArray[np.bool_]) -> Segment | None:
        """A segment of the records that `mask` selects: this one if it selects all, None if none, else a new one."""
        if mask.all() or not mask.any():
            return self if mask.all() else None
        keys = [keys for keys, is_kept in zip(self.read_keys(), mask, strict=True) if is_kept]
        return write(self.uri, read(self.uri, self.digest).records.filter(mask), keys)


def write(uri: str, records: pa.Table, keys: Sequence[RowKeys]) -> Segment:
    """Writes a segment into the folder `uri`. It exists once its records are written, after its keys."""
    all_keys = np.concatenate([np.zeros((0, 3), np.uint64), *keys]).tobytes()
    records = records.replace_schema_metadata({_KEYS_SHA256: hashlib.sha256(all_keys).hexdigest().encode()})
    data = storage.encode_parquet(records, dictionaries=["columns"])
    digest = hashlib.sha256(data).hexdigest()
    storage.write_bytes(storage.join(uri, digest + _KEYS), all_keys)
    storage.write_bytes(storage.join(uri, digest + _RECORDS), data)
    return Segment(uri, digest, records.select(LISTED))


def list_digests(uri: str) -> list[str]:
    """The digests of the segments in the folder `uri`."""
    return [name.removesuffix(_RECORDS) for name in storage.list_names(uri) if name.endswith(_RECORDS)]


def read_all(uri: str) -> list[Segment]:
    """Reads all segments in the folder `uri`, with the columns `LISTED`."""
    digests = list_digests(uri)
    objects = storage.read_many([storage.join(uri, digest + _RECORDS) for digest in digests])
    return [_parse(uri, digest, data, LISTED) for digest, data in zip(digests, objects, strict=True)]


@lru_cache(64)
def read(uri: str, digest: str) -> Segment:
    """Reads one segment with all columns. Segments never change, so recent ones are cached."""
    return _parse(uri, digest, storage.read_bytes(storage.join(uri, digest + _RECORDS)), COMMITS.names)


def remove(uri: str, digests: Collection[str]) -> None:
    """Deletes segments, and keys without records, which a killed writer may leave."""
    storage.remove_many([storage.join(uri, digest + _RECORDS) for digest in digests])
    names = storage.list_names(uri)
    orphans = {n.removesuffix(_KEYS) for n in names if n.endswith(_KEYS)} - {n.removesuffix(_RECORDS) for n in names}
    storage.remove_many([storage.join(uri, digest + _KEYS) for digest in sorted(orphans)])


def _parse(uri: str, digest: str, data: bytes, columns: Sequence[str]) -> Segment:
    if hashlib.sha256(data).hexdigest() != digest:
        raise _damaged(storage.join(uri, digest + _RECORDS))
    return Segment(uri, digest, pq.read_table(io.BytesIO(data), columns=list(columns)))


def _damaged(path: str) -> UserError:
    segment = path.removesuffix(_KEYS).removesuffix(_RECORDS)
    return UserError(
        f"{path}: is damaged: remove {segment}{_RECORDS}, and the shards that it records are computed again"
    )
