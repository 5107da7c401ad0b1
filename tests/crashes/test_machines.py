"""Tests of the simulation itself: each change is a moment, and a dead program changes nothing."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from crashes.bucket import ObjectStore
from crashes.enumeration import Machines, Scenario, crash_everywhere
from crashes.life import Crash
from prefill_router import storage


def test_each_system_call_that_changes_a_disk_is_a_moment(disks: Machines) -> None:
    disk = disks()

    def program() -> None:
        storage.write_bytes(storage.join(disk.uri, "a"), b"data")
        storage.create_bytes(storage.join(disk.uri, "b"), b"data")
        storage.create_bytes(storage.join(disk.uri, "b"), b"other")
        storage.read_bytes(storage.join(disk.uri, "a"))
        storage.remove(disk.uri)
        storage.remove(disk.uri)

    made = [moment.split(".")[0].split()[0] for moment in disk.run(program).moments]
    draft = ["open", "write"]
    writing = ["make", *draft, "rename"]
    creating = [*draft, "link", "remove"]
    assert made == [*writing, *creating, *draft, "remove", "remove", "remove", "remove"]


def test_a_file_can_be_left_half_written(disks: Machines) -> None:
    disk = disks()
    life = disk.run(lambda: storage.write_bytes(storage.join(disk.uri, "a"), b"12345678"), dies_at=3)
    assert life.death is not None
    assert life.death.startswith("write out/.a.")
    [draft] = Path(disk.uri).iterdir()
    assert draft.read_bytes() == b"1234"
    assert storage.list_names(disk.uri) == []


def test_a_deletion_of_many_can_be_stopped_in_its_midst(machines: Machines) -> None:
    uris: list[str] = []

    def left(dies_at: int) -> int:
        machine = machines()
        uris[:] = [storage.join(machine.uri, f"part-{i}") for i in range(5)]
        for uri in uris:
            storage.write_bytes(uri, b"")
        assert machine.run(lambda: storage.remove_many(uris), dies_at).death is not None
        return len(storage.list_names(machine.uri))

    assert {left(dies_at) for dies_at in range(1, 6)} >= {5, 4, 3}


def test_a_change_can_be_made_and_its_answer_lost(buckets: Machines) -> None:
    bucket = buckets()
    uri = storage.join(bucket.uri, "a")
    for dies_at, is_there in ((1, False), (2, True)):
        assert bucket.run(lambda: storage.create_bytes(uri, b""), dies_at).death is not None
        assert storage.exists(uri) is is_there


def test_the_dead_change_nothing(machines: Machines) -> None:
    machine = machines()
    uri = storage.join(machine.uri, "a")

    def program() -> None:
        try:
            storage.write_bytes(uri, b"first")
        finally:
            storage.write_bytes(uri, b"second")

    machine.run(program, dies_at=1)
    assert not storage.exists(uri)


def test_a_death_that_a_program_ignores_is_an_error(machines: Machines) -> None:
    machine = machines()

    def program() -> None:
        with suppress(Crash):
            storage.write_bytes(storage.join(machine.uri, "a"), b"")

    with pytest.raises(AssertionError, match="went on after its death"):
        machine.run(program, dies_at=1)


class Doubling(Scenario):
    """A program that is not idempotent: it appends a letter to one object and then to another."""

    def run(self) -> None:
        for name in "ab":
            uri = storage.join(self.out, name)
            storage.write_bytes(uri, (storage.read_bytes(uri) if storage.exists(uri) else b"") + b"x")

    def result(self) -> Any:
        return [storage.read_bytes(storage.join(self.out, name)) for name in "ab"]


def test_a_program_that_does_things_twice_is_found(machines: Machines) -> None:
    with pytest.raises(AssertionError) as error:
        crash_everywhere(machines, Doubling)
    assert "after a crash at moment" in error.value.__notes__[0]


def test_an_object_store_has_no_folders() -> None:
    store = ObjectStore()
    store.write("bucket/a/b/c", b"data")
    assert store.ls("bucket/a") == [{"name": "bucket/a/b", "size": 0, "type": "directory"}]
    assert store.create("bucket/a/b/c", b"other") is False
    assert store.cat_file("bucket/a/b/c", 1, 3) == b"at"
    store.remove_many(["bucket/a/b/c", "bucket/nothing"])
    assert not store.exists("bucket/a")
    with pytest.raises(FileNotFoundError):
        store.ls("bucket/a")


def test_what_lies_outside_a_disk_is_no_moment(disks: Machines, tmp_path: Path) -> None:
    disk = disks()

    def program() -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_bytes(b"")
        shutil.rmtree(tmp_path / "elsewhere")

    assert disk.run(program).moments == []
