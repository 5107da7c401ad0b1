from __future__ import annotations

import pytest

from prefill_router import storage


def test_list_files_keeps_the_visible_ones_directly_below_in_order(root: str) -> None:
    for name in ("b.csv", "a.csv", "c.txt", "_c.csv", ".d.csv", "below/e.csv"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert storage.list_files(root, [".csv"]) == [storage.join(root, "a.csv"), storage.join(root, "b.csv")]
    assert storage.list_files(root + "/", [".csv", ".txt"])[-1] == storage.join(root, "c.txt")


def test_list_files_of_a_file_is_that_file(root: str) -> None:
    uri = storage.join(root, "a.csv")
    storage.write_bytes(uri, b"x")
    assert storage.list_files(uri, [".parquet"]) == [uri]


def test_list_names_gives_what_lies_directly_below(root: str) -> None:
    assert storage.list_names(storage.join(root, "folder")) == []
    for name in ("b", "a", "below/c", ".temporary", "_kept"):
        storage.write_bytes(storage.join(root, "folder", name), b"x")
    assert storage.list_names(storage.join(root, "folder")) == ["_kept", "a", "b", "below"]
    assert storage.list_names(storage.join(root, "folder") + "/") == ["_kept", "a", "b", "below"]
    assert storage.list_names(storage.join(root, "folder", "a")) == []


def test_list_names_gives_all_of_them(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # S3 lists in pages, by default of a thousand
    names = [f"{i:02d}" for i in range(25)]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"")
    assert storage.list_names(root) == names
