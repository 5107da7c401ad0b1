from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_router import storage
from prefill_router.errors import UserError


def test_bytes_come_back_and_are_replaced(root: str) -> None:
    uri = storage.join(root, "folder", "object.bin")
    assert not storage.exists(uri)
    for data in (b"first", b"", b"\x00second"):
        storage.write_bytes(uri, data)
        assert storage.exists(uri)
        assert storage.read_bytes(uri) == data
    assert storage.list_files(storage.join(root, "folder"), [""]) == [uri]


def test_json_comes_back(root: str) -> None:
    uri = storage.join(root, "value.json")
    storage.write_json(uri, {"a": [1, None, "ü"]})
    assert storage.read_json(uri) == {"a": [1, None, "ü"]}


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(str(tmp_path / "value.json"), float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_json_is_an_error(root: str) -> None:
    uri = storage.join(root, "value.json")
    storage.write_bytes(uri, b"{")
    with pytest.raises(UserError, match=r"value\.json: not JSON"):
        storage.read_json(uri)


def test_list_files_keeps_the_visible_ones_directly_below_in_order(root: str) -> None:
    for name in ("b.csv", "a.csv", "c.txt", "_c.csv", ".d.csv", "below/e.csv"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert storage.list_files(root, [".csv"]) == [storage.join(root, "a.csv"), storage.join(root, "b.csv")]
    assert storage.list_files(root + "/", [".csv", ".txt"])[-1] == storage.join(root, "c.txt")


def test_list_files_of_a_file_is_that_file(root: str) -> None:
    uri = storage.join(root, "a.csv")
    storage.write_bytes(uri, b"x")
    assert storage.list_files(uri, [".parquet"]) == [uri]


def test_remove_takes_a_file_a_folder_or_nothing(root: str) -> None:
    names = ["a/1.txt", "a/b/2.txt", "c.txt"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"x")
    storage.remove(storage.join(root, "missing"))
    storage.remove(storage.join(root, "a"))
    assert [storage.exists(storage.join(root, name)) for name in names] == [False, False, True]
    storage.remove(storage.join(root, "c.txt"))
    assert not storage.exists(storage.join(root, "c.txt"))


def test_open_input_is_seekable(root: str) -> None:
    uri = storage.join(root, "text")
    storage.write_bytes(uri, b"one\ntwo\n")
    with storage.open_input(uri) as stream:
        assert stream.readline() == b"one\n"
        stream.seek(1)
        assert stream.read() == b"ne\ntwo\n"


def test_a_write_that_fails_leaves_the_old_object_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "object.bin"
    storage.write_bytes(str(path), b"old")

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(path), b"new, but never whole")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_to_a_bucket_that_is_not_there_fails(s3_bucket: str) -> None:
    with pytest.raises(OSError, match="bucket does not exist"):
        storage.write_bytes(f"{s3_bucket}-no-such-bucket/key", b"data")


def test_a_parquet_table_comes_back_by_column(root: str) -> None:
    uri = storage.join(root, "table.parquet")
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", None], "c": [[1.0], [], None]})
    storage.write_bytes(uri, storage.encode_parquet(table))
    assert storage.read_table(uri).equals(table)
    assert storage.read_table(uri, ["c", "a"]).column_names == ["c", "a"]
    with storage.open_parquet(uri) as file:
        assert file.metadata.num_rows == 3
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("data", [b"", b"prompt_id,prompt\n", b"PAR1 but no footer"])
def test_what_is_no_parquet_is_an_error(root: str, data: bytes) -> None:
    uri = storage.join(root, "table.parquet")
    storage.write_bytes(uri, data)
    with pytest.raises(UserError, match=r"table\.parquet: not a Parquet file"):
        storage.read_table(uri)


def test_arrow_reads_at_the_location_it_is_given(root: str) -> None:
    uri = storage.join(root, "table.parquet")
    table = pa.table({"a": [1, 2]})
    storage.write_bytes(uri, storage.encode_parquet(table))
    filesystem, path = storage.arrow_location(uri)
    assert pq.read_table(path, filesystem=filesystem).equals(table)


def test_require_names_what_is_missing(root: str) -> None:
    storage.write_bytes(storage.join(root, "there"), b"x")
    storage.require(storage.join(root, "there"), "corpus")
    with pytest.raises(UserError, match="missing: no such corpus"):
        storage.require(storage.join(root, "missing"), "corpus")


@pytest.mark.parametrize(
    ("uri", "message"),
    [("gs://bucket/key", '"gs" is not supported: .*s3://'), ("", "empty path"), ("s3://", "names no bucket")],
)
def test_an_uri_that_leads_nowhere_is_an_error(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        storage.resolve(uri)


def test_a_path_and_its_file_uri_are_the_same(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a", b"data")
    assert storage.read_bytes(str(tmp_path / "a")) == b"data"


def test_a_relative_path_is_made_absolute_and_an_uri_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("~/a") == str(Path.home() / "a")
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


def test_join_and_name() -> None:
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("/", "a").lstrip("/") == "a"
    assert storage.name("s3://bucket/a/b/") == "b"
