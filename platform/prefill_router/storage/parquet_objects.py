"""Parquet objects that a manifest commits: each is written whole under a deterministic name, with its checksum."""

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
    """One committed object."""

    name: str
    rows: int
    bytes: int
    sha256: str


def write_shard(uri: str, index: int, table: pa.Table) -> ShardFile:
    """Writes shard `index` below `uri`; doing it again replaces it by the same."""
    return write_named(uri, f"part-{index:06d}.parquet", table)


def write_named(uri: str, name: str, table: pa.Table) -> ShardFile:
    """Writes a table as the file `name` below `uri`."""
    data = storage.encode_parquet(table)
    storage.write_bytes(storage.join(uri, name), data)
    return _described(name, len(table), data)


def file_name(name: str) -> str:
    """The file that `create_shard` writes."""
    return f"part-{name}.parquet"


def create_shard(uri: str, name: str, table: pa.Table) -> ShardFile:
    """Writes the shard that `name` (32 hex digits) stands for, unless it lies there already: then it is left as it is.

    Objects are whole and named by what they hold, so that one which a writer left before it died is as good.
    """
    name = file_name(name)
    data = storage.encode_parquet(table)
    if not storage.create_bytes(storage.join(uri, name), data):
        data = storage.read_bytes(storage.join(uri, name))
    return _described(name, len(table), data)


def write_addressed(uri: str, folder: str, table: pa.Table) -> ShardFile:
    """Writes a table into a folder below `uri` under the name that its bytes give it, unless it lies there."""
    data = storage.encode_parquet(table)
    name = f"{folder}/{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    storage.create_bytes(storage.join(uri, name), data)
    return _described(name, len(table), data)


def read_addressed(uri: str, file: ShardFile) -> pa.Table:
    """What `write_addressed` wrote. Raises UserError where it is gone or damaged."""
    path = storage.join(uri, file.name)
    storage.require(path, "list of shards, though the manifest names it")
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(f"{path}: its checksum is not the one in {MANIFEST}: it is not what was written")
    return pq.read_table(io.BytesIO(data))


def _described(name: str, rows: int, data: bytes) -> ShardFile:
    return ShardFile(name=name, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_shard(uri: str, shard: ShardFile, columns: Sequence[str]) -> pa.Table:
    """Raises UserError where the object is gone or damaged, or is not the one that was committed."""
    path, remedy = storage.join(uri, shard.name), f"remove {uri} and write it anew, as extract or embed did"
    storage.require(path, "shard, though the manifest names it")
    size = storage.size_bytes(path)
    if size != shard.bytes:
        raise UserError(
            f"{path}: has {size:,} bytes, but the manifest says {shard.bytes:,}: it is not what was written: {remedy}"
        )
    table = storage.read_table(path, columns, remedy)
    if len(table) != shard.rows or not set(columns) <= set(table.column_names):
        raise UserError(
            f"{path}: holds other rows or columns than the manifest says: it is not what was written: {remedy}"
        )
    return table


def remove_shards(uri: str, keep: Collection[str] = (), *, at_any_depth: bool = False) -> None:
    """Deletes the shards directly below `uri`, or at any depth, except those named in `keep`, and nothing else."""
    names = _names_below(uri) if at_any_depth else storage.list_names(uri)
    ours = [name for name in names if _SHARD_NAME.fullmatch(storage.name(name)) and name not in keep]
    storage.remove_many([storage.join(uri, name) for name in ours])


def _names_below(uri: str) -> list[str]:
    found = storage.find_files(uri) if storage.exists(uri) else []
    return [path.removeprefix(uri).strip("/") for path in found]
