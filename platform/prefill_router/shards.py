"""Parquet objects that a manifest commits: each is written whole under a deterministic name, with its checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from prefill_router import storage
from prefill_router.config import StrictModel
from prefill_router.errors import UserError

MANIFEST = "manifest.json"


class ShardFile(StrictModel):
    """One committed object."""

    name: str
    rows: int
    bytes: int
    sha256: str


def write_shard(uri: str, index: int, table: pa.Table) -> ShardFile:
    """Writes shard `index` below `uri`; doing it again replaces it by the same."""
    name = f"part-{index:06d}.parquet"
    data = storage.encode_parquet(table)
    storage.write_bytes(storage.join(uri, name), data)
    return ShardFile(name=name, rows=len(table), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_shard(uri: str, shard: ShardFile, columns: Sequence[str]) -> pa.Table:
    """Raises UserError where the object is gone, or is not the one that was committed."""
    path = storage.join(uri, shard.name)
    storage.require(path, "shard, though the manifest names it")
    table = storage.read_table(path, columns)
    if len(table) != shard.rows:
        raise UserError(
            f"{path}: holds {len(table)} rows, but the manifest says {shard.rows}: it is not what was written"
        )
    return table


def claim_output(uri: str, *, overwrite: bool) -> None:
    """Clears what an unfinished run left at `uri` and, with `overwrite`, a finished one, its manifest first.

    Only manifests and shards are ever deleted. Raises UserError where a finished output is not to be replaced.
    """
    if not storage.exists(uri):
        return
    manifest = storage.join(uri, MANIFEST)
    if storage.exists(manifest) and not overwrite:
        raise UserError(f"{uri}: already holds an output: choose another --out, or replace it with --overwrite")
    storage.remove(manifest)
    for path in storage.list_files(uri, [".parquet"]):
        if storage.name(path).startswith("part-"):
            storage.remove(path)
