"""Parquet files that a manifest commits: each has a deterministic name and a checksum, and is written atomically."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel

MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"part-(\d{6,}|[0-9a-f]{32})\.parquet")


class ShardFile(StrictModel):
    """The description of a committed Parquet file."""

    name: str
    rows: int
    bytes: int
    sha256: str


def write_shard(uri: str, index: int, table: pa.Table) -> ShardFile:
    """Writes shard `index` below `uri`, replacing an earlier one."""
    return write_named(uri, f"part-{index:06d}.parquet", table)


def write_named(uri: str, name: str, table: pa.Table) -> ShardFile:
    """Writes a table as the file `name` below `uri`."""
    data = storage.encode_parquet(table)
    storage.write_bytes(storage.join(uri, name), data)
    return _described(name, len(table), data)


def file_name(name: str) -> str:
    """The name of the file that `create_shard` writes."""
    return f"part-{name}.parquet"


def create_shard(uri: str, name: str, table: pa.Table) -> ShardFile:
    """Writes the shard `name` (32 hex digits) below `uri`, unless it exists.

    Files are written atomically and named by their content, so one that a killed writer left is equivalent.
    """
    name = file_name(name)
    data = storage.encode_parquet(table)
    if not storage.create_bytes(storage.join(uri, name), data):
        data = storage.read_bytes(storage.join(uri, name))
    return _described(name, len(table), data)


def write_addressed(uri: str, folder: str, table: pa.Table) -> ShardFile:
    """Writes a table into a folder below `uri`, named by the hash of its bytes, unless it exists."""
    data = storage.encode_parquet(table)
    name = f"{folder}/{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    storage.create_bytes(storage.join(uri, name), data)
    return _described(name, len(table), data)


def read_addressed(uri: str, file: ShardFile) -> pa.Table:
    """Reads a table that `write_addressed` wrote. Raises UserError if it is missing or damaged."""
    path = storage.join(uri, file.name)
    storage.require(path, f"list of shards, though {MANIFEST} names it")
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(f"{path}: its checksum is not the one in {MANIFEST}: remove {uri} and write it again")
    return pq.read_table(io.BytesIO(data))


def _described(name: str, rows: int, data: bytes) -> ShardFile:
    return ShardFile(name=name, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_shard(uri: str, shard: ShardFile, columns: Sequence[str]) -> pa.Table:
    """Reads columns of a shard. Raises UserError if the file is missing, damaged, or not the one that was committed."""
    path, remedy = storage.join(uri, shard.name), f"remove {uri} and write it again, for example with extract"
    storage.require(path, f"shard, though {MANIFEST} names it")
    size = storage.size_bytes(path)
    if size != shard.bytes:
        raise UserError(f"{path}: has {size:,} bytes, must have {shard.bytes:,} according to {MANIFEST}: {remedy}")
    table = storage.read_table(path, columns, remedy)
    if len(table) != shard.rows or not set(columns) <= set(table.column_names):
        raise UserError(f"{path}: its rows or columns are not those of {MANIFEST}: {remedy}")
    return table


def is_shard(name: str) -> bool:
    """Whether a file's name is one that shards are given here."""
    return _SHARD_NAME.fullmatch(name) is not None


def remove_shards(uri: str, keep: Collection[str] = (), *, at_any_depth: bool = False) -> None:
    """Deletes the shards directly below `uri`, or at any depth, except those named in `keep`; touches no other file."""
    names = _names_below(uri) if at_any_depth else storage.list_names(uri)
    ours = [name for name in names if is_shard(storage.name(name)) and name not in keep]
    storage.remove_many([storage.join(uri, name) for name in ours])


def _names_below(uri: str) -> list[str]:
    found = storage.find_files(uri) if storage.exists(uri) else []
    return [path.removeprefix(uri).strip("/") for path in found]
