from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from prefill_router import storage
from prefill_router.errors import UserError
from prefill_router.shards import MANIFEST, claim_output, read_shard, write_shard

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
    with pytest.raises(UserError, match=r"part-000000\.parquet: no such shard, though the manifest names it"):
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
    with pytest.raises(UserError, match=r"part-000000\.parquet: .*not what was written"):
        read_shard(str(tmp_path), shard, ["a", "b"])


def test_a_shard_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), 0, TABLE)
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-000000\.parquet: "):
        read_shard(str(tmp_path), shard, ["a"])


# --- claim_output ------------------------------------------------------------------------------------------------


def test_a_new_output_may_be_claimed(root: str) -> None:
    claim_output(storage.join(root, "new"), overwrite=False)
    claim_output(storage.join(root, "new"), overwrite=True)
    assert not storage.exists(storage.join(root, "new", MANIFEST))


def test_what_an_unfinished_run_left_is_cleared(root: str) -> None:
    for index in range(3):
        write_shard(root, index, TABLE)
    put(root, "notes.txt")
    claim_output(root, overwrite=False)
    assert left(root) == ["notes.txt"]


def test_a_finished_output_is_refused(root: str) -> None:
    shard = write_shard(root, 0, TABLE)
    put(root, MANIFEST)
    with pytest.raises(UserError, match=f"{root}: already holds an output: choose another --out, or .*--overwrite"):
        claim_output(root, overwrite=False)
    assert left(root) == [MANIFEST, shard.name]


@pytest.mark.parametrize("finished", [False, True])
def test_only_manifests_and_shards_are_ever_deleted(root: str, finished: bool) -> None:
    """Spark, too, calls its files part-..."""
    foreign = ["mine.parquet", "notes.txt", "part-00000-1b2c-c000.snappy.parquet", "part-of-speech.parquet"]
    put(root, *foreign, "folder/part-000000.parquet", *([MANIFEST] if finished else []))
    write_shard(root, 0, TABLE)
    claim_output(root, overwrite=True)
    assert left(root) == foreign
    assert storage.exists(storage.join(root, "folder", "part-000000.parquet"))


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a claim that is cut short leaves an unfinished output, never a manifest that names what is gone."""
    write_shard(str(tmp_path), 0, TABLE)
    put(str(tmp_path), MANIFEST)
    remove, removed = storage.remove, []

    def record(uri: str) -> None:
        removed.append(storage.name(uri))
        remove(uri)

    monkeypatch.setattr(storage, "remove", record)
    claim_output(str(tmp_path), overwrite=True)
    assert removed == [MANIFEST, "part-000000.parquet"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_at_the_place_of_an_output_is_kept(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "part-of-mine.parquet"
    path.write_text("mine")
    with suppress(UserError):
        claim_output(str(path), overwrite=overwrite)
    assert path.read_text() == "mine"
