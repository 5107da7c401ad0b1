from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prefill_router
from prefill_router import storage
from prefill_router.common.errors import UserError


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


def test_remove_takes_a_file_a_folder_or_nothing(root: str) -> None:
    names = ["a/1.txt", "a/b/2.txt", "c.txt"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"x")
    storage.remove(storage.join(root, "missing"))
    storage.remove(storage.join(root, "a"))
    assert [storage.exists(storage.join(root, name)) for name in names] == [False, False, True]
    storage.remove(storage.join(root, "c.txt"))
    assert not storage.exists(storage.join(root, "c.txt"))


def test_remove_many_takes_files_and_passes_over_what_is_gone(root: str) -> None:
    uris = [storage.join(root, name) for name in ("a", "b/[c]*", "d")]
    for uri in uris:
        storage.write_bytes(uri, b"x")
    storage.remove_many([uris[0], storage.join(root, "missing"), uris[1]])
    assert [storage.exists(uri) for uri in uris] == [False, False, True]
    storage.remove_many([])


@pytest.mark.parametrize("special", ["run[1]", "run*", "run?", "run%31", "run+1", "run=1", "run#1", "run{1}", "run 1"])
def test_names_are_taken_literally(root: str, special: str) -> None:
    sibling = "run1"  # matches the name, if it is taken for a pattern
    folders = [storage.join(root, name) for name in (special, sibling)]
    files = [storage.join(folder, special) for folder in folders]
    for file in files:
        storage.write_bytes(file, b"old")
        storage.write_bytes(file, file.encode())
        assert not storage.create_bytes(file, b"another's")
        assert storage.create_bytes(f"{file}.new", b"new")
    assert storage.list_names(root) == sorted([special, sibling])
    for folder, file in zip(folders, files, strict=True):
        assert storage.list_names(folder) == [special, f"{special}.new"]
        assert storage.find_files(folder) == storage.list_files(folder, [""]) == [file, f"{file}.new"]
        assert storage.exists(folder)
        assert storage.is_file(file)
        assert not storage.is_file(folder)
        assert storage.read_bytes(file) == storage.read_many([file])[0] == file.encode()
        assert storage.read_range(file, 1, 3) == file.encode()[1:3]
        assert storage.size_bytes(file) == len(file.encode())
        with storage.open_input(file) as stream:
            assert stream.read() == file.encode()
        table = pa.table({"x": [1]})
        storage.write_bytes(f"{file}.parquet", storage.encode_parquet(table))
        assert storage.read_table(f"{file}.parquet") == table
        filesystem, path = storage.arrow_location(f"{file}.parquet")
        assert pq.read_table(path, filesystem=filesystem) == table
        storage.remove(f"{file}.new")
        storage.remove_many([f"{file}.parquet"])
        assert storage.find_files(folder) == [file]
    storage.remove(folders[0])
    assert [storage.exists(folder) for folder in folders] == [False, True]
    assert storage.find_files(folders[1]) == [files[1]]


def test_read_range_gives_the_bytes_from_start_to_end(root: str) -> None:
    uri = storage.join(root, "digits")
    storage.write_bytes(uri, b"0123456789")
    assert [storage.read_range(uri, *bounds) for bounds in ((0, 10), (3, 5), (9, 10), (4, 4))] == [
        b"0123456789", b"34", b"9", b""
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError):
        storage.read_range(storage.join(root, "missing"), 0, 1)


def test_open_input_is_seekable(root: str) -> None:
    uri = storage.join(root, "text")
    storage.write_bytes(uri, b"one\ntwo\n")
    with storage.open_input(uri) as stream:
        assert stream.readline() == b"one\n"
        stream.seek(1)
        assert stream.read() == b"ne\ntwo\n"


def test_a_write_that_fails_leaves_the_old_object_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# --- create, read many -------------------------------------------------------------------------------------------


def test_what_lies_there_is_not_created_again(root: str) -> None:
    uri = storage.join(root, "folder", "object")
    assert storage.create_bytes(uri, b"first") is True
    assert storage.create_bytes(uri, b"second") is False
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_files(storage.join(root, "folder"), [""]) == [uri]
    storage.write_bytes(uri, b"third")
    storage.remove(uri)
    assert storage.create_bytes(uri, b"") is True
    assert storage.read_bytes(uri) == b""


def test_of_racing_creators_one_creates(root: str) -> None:
    """The object holds all the data of the caller that was told that it created the object."""
    creators = 8
    start = threading.Barrier(creators)

    def create(creator: int) -> list[bool]:
        created = []
        for i in range(6):
            start.wait()
            created.append(storage.create_bytes(storage.join(root, str(i)), bytes([creator]) * 100_000))
        return created

    with ThreadPoolExecutor(creators) as pool:
        by_round = list(zip(*pool.map(create, range(creators)), strict=True))
    for i, created in enumerate(by_round):
        assert sum(created) == 1
        assert storage.read_bytes(storage.join(root, str(i))) == bytes([created.index(True)]) * 100_000


def test_creating_where_another_error_stands_in_the_way_raises_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(OSError, match="file"):
        storage.create_bytes(str(tmp_path / "file" / "object"), b"data")


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(UserError, match=r"object: this file system has no hard links.*: choose another file system"):
        storage.create_bytes(str(tmp_path / "object"), b"data")
    assert list(tmp_path.iterdir()) == []


def test_many_are_read_in_the_order_that_was_asked_for(root: str) -> None:
    uris = [storage.join(root, f"{i}.bin") for i in range(40)]
    for i, uri in enumerate(uris):
        storage.write_bytes(uri, bytes([i]) * i)
    assert storage.read_many(uris[::-1]) == [bytes([i]) * i for i in range(40)][::-1]
    assert storage.read_many([]) == []
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_many([*uris, storage.join(root, "missing")])


FILL = """
import os, sys
from prefill_router import storage
folder = sys.argv[1]
storage.write_bytes(f"{folder}/old", b"old")
for write, name in ((storage.write_bytes, "old"), (storage.write_bytes, "new"), (storage.create_bytes, "new")):
    try:
        write(f"{folder}/{name}", bytes(1 << 20))
    except OSError as error:
        print(error)
print(sorted(os.listdir(folder)), storage.read_bytes(f"{folder}/old"))
"""


def test_a_full_disk_is_named_and_keeps_what_there_was(tmp_path: Path) -> None:
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"']
    if subprocess.run([*mounted, str(tmp_path), "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    environment = {**os.environ, "PYTHONPATH": str(Path(prefill_router.__file__).parents[1])}
    done = subprocess.run(
        [*mounted, str(tmp_path), sys.executable, "-c", FILL, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    full = "[Errno 28] No space left on device: '{}'"
    assert done.stdout.splitlines() == [
        full.format(tmp_path / "old"),
        full.format(tmp_path / "new"),
        full.format(tmp_path / "new"),
        "['old'] b'old'",
    ]


# --- URIs --------------------------------------------------------------------------------------------------------


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


def test_a_misspelt_file_is_told_of_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "answers.csv").touch()
    with pytest.raises(UserError, match=r'answer.csv: no such source, did you mean "answers.csv"\?$'):
        storage.require(str(tmp_path / "answer.csv"), "source")
    with pytest.raises(UserError, match=r"pool.toml: no such file$"):
        storage.require(str(tmp_path / "pool.toml"), "file")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/key", '"gs" is not supported: .*s3://'),
        ("", "empty path"),
        ("s3://", "names no bucket"),
        ("s3://bucket/key?versionId=1", "only the latest"),
    ],
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


# --- check_output ------------------------------------------------------------------------------------------------


def test_a_file_at_the_place_of_an_output_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "part-of-mine.parquet"
    path.write_text("mine")
    with pytest.raises(UserError, match="is a file: an output is a folder"):
        storage.check_output(str(path))
    storage.check_output(str(tmp_path))
    storage.check_output(str(tmp_path / "new"))
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match=f"cannot be written: {path} is a file: choose another --out"):
        storage.check_output(f"{path}/below/it")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_arguments: False)  # root may write anywhere
    with pytest.raises(UserError, match=f"cannot be written: {tmp_path} is not writable: choose another --out"):
        storage.check_output(str(tmp_path / "new" / "out"))


def test_looking_at_an_output_leaves_nothing_there(root: str) -> None:
    out = storage.join(root, "out")
    storage.check_output(out)
    assert not storage.exists(out)


def test_a_bucket_that_is_missing_is_no_output(s3_bucket: str) -> None:
    with pytest.raises(UserError, match=r"no-such-bucket/out: cannot be written: .*: choose another --out"):
        storage.check_output("s3://no-such-bucket/out")
