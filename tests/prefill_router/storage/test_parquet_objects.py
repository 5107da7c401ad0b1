from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.storage.parquet_objects import read_shard, remove_shards, write_shard

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]})


def put(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())


def left(root: str) -> list[str]:
    return [storage.name(uri) for uri in storage.list_files(root, [""])]


def test_a_shard_has_a_deterministic_name_and_comes_back_by_column(root: str) -> None:
    shard = write_shard(root, 7, TABLE)
    assert shard.name == "part-000007.parquet"
    assert read_shard(root, shard, ["a", "b"]).equals(TABLE)
    assert read_shard(root, shard, ["b"]).column_names == ["b"]


def test_a_shard_is_described_by_its_rows_bytes_and_checksum(root: str) -> None:
    shard = write_shard(root, 0, TABLE)
    data = storage.read_bytes(storage.join(root, shard.name))
    assert (shard.rows, shard.bytes, shard.sha256) == (3, len(data), hashlib.sha256(data).hexdigest())


def test_writing_a_shard_again_replaces_it_by_the_same(root: str) -> None:
    assert write_shard(root, 0, TABLE) == write_shard(root, 0, TABLE)
    assert left(root) == ["part-000000.parquet"]


def test_a_shard_that_is_gone_is_an_error(root: str) -> None:
    shard = write_shard(root, 0, TABLE)
    storage.remove(storage.join(root, shard.name))
    with pytest.raises(UserError, match=r"part-000000\.parquet: no such shard, though manifest\.json names it"):
        read_shard(root, shard, ["a"])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(TABLE.slice(1), id="fewer rows"),
        pytest.param(TABLE.select(["b"]), id="a column less"),
        pytest.param(TABLE.set_column(1, "b", pa.array(["a longer text than it was", "y", "z"])), id="other values"),
    ],
)
def test_a_shard_that_is_not_the_committed_one_is_an_error(tmp_path: Path, other: pa.Table) -> None:
    shard = write_shard(str(tmp_path), 0, TABLE)
    write_shard(str(tmp_path), 0, other)
    with pytest.raises(UserError, match=r"part-000000\.parquet: .* manifest\.json: remove .* and write it again"):
        read_shard(str(tmp_path), shard, ["a", "b"])


def test_a_shard_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), 0, TABLE)
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-000000\.parquet: "):
        read_shard(str(tmp_path), shard, ["a"])


# --- remove_shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_any_depth", [False, True])
def test_only_shards_that_are_not_kept_are_ever_deleted(root: str, at_any_depth: bool) -> None:
    """Spark also names its files part-..."""
    foreign = ["mine.parquet", "notes.txt", "part-00000-1b2c-c000.snappy.parquet", "part-of-speech.parquet"]
    put(root, *foreign, "folder/part-000000.parquet", "folder/part-000001.parquet", "folder/notes.txt")
    write_shard(root, 0, TABLE)
    kept = write_shard(root, 1, TABLE)
    remove_shards(root, keep=[kept.name, "folder/part-000001.parquet"], at_any_depth=at_any_depth)
    assert left(root) == sorted([*foreign, kept.name])
    assert storage.exists(storage.join(root, "folder", "part-000000.parquet")) is not at_any_depth
    assert storage.exists(storage.join(root, "folder", "part-000001.parquet"))
    assert storage.exists(storage.join(root, "folder", "notes.txt"))


def test_where_there_is_no_folder_nothing_is_removed(root: str) -> None:
    for at_any_depth in (False, True):
        remove_shards(storage.join(root, "none"), at_any_depth=at_any_depth)
