"""Storage on a failing S3: operations succeed exactly once, or fail with one line in bounded time."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pytest

from faults import FaultProxy, Faults
from prefill_router import storage
from prefill_router.storage import s3, uris
from prefill_router.storage.lease import Lease

ONE_IN_FIVE = [
    Faults(error_500=0.2),
    Faults(slow_down=0.2),
    Faults(reset_before=0.2),
    Faults(reset_after=0.2),
    Faults(cut_body=0.2),
    Faults(black_hole=0.2),
]
ALL_AT_ONCE = Faults(**{field.name: 0.2 / len(fields(Faults)) for field in fields(Faults)})


def name(faults: Faults) -> str:
    return next(field for field, chance in vars(faults).items() if chance)


@pytest.fixture
def root(s3_bucket: str) -> str:
    return f"{s3_bucket}/faults-{uuid.uuid4().hex}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens timeouts from 10 s to 0.5 s."""
    monkeypatch.setattr(s3.S3, "read_timeout", 0.5)
    monkeypatch.setattr(s3, "STALL_S", 0.5)


def bound_s() -> float:
    """The maximum time of an operation without any answer; aiohttp retries a broken upload once."""
    pauses = sum(0.1 * 1.7**attempt for attempt in range(s3.S3.retries))
    return s3.S3.retries * max(s3.S3.read_timeout, s3.S3.connect_timeout, 2 * s3.STALL_S) + pauses


def once(method: str) -> Callable[[str, str], bool]:
    """Selects only the first request with this method."""
    left = [True]

    def is_first(its_method: str, _path: str) -> bool:
        return its_method == method and bool(left) and left.pop()

    return is_first


# --- temporary faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", ONE_IN_FIVE, ids=name)
def test_what_is_written_is_read_back(impatient: None, faulty_s3: FaultProxy, root: str, faults: Faults) -> None:
    faulty_s3.faults = faults
    objects = {f"{i:02d}.bin": bytes([i]) * (i * 3001) for i in range(12)}
    for key, data in objects.items():
        write = storage.write_bytes if len(data) % 2 else storage.create_bytes
        write(storage.join(root, "objects", key), data)
    assert storage.list_names(storage.join(root, "objects")) == sorted(objects)
    assert storage.read_many([storage.join(root, "objects", key) for key in objects]) == list(objects.values())

    table = pa.table({"a": list(range(5000)), "b": [str(i) for i in range(5000)]})
    path = storage.join(root, "table.parquet")
    storage.write_bytes(path, storage.encode_parquet(table))
    assert storage.size_bytes(path) == len(storage.read_bytes(path))
    assert storage.read_table(path, ["b"]).equals(table.select(["b"]))

    storage.remove(storage.join(root, "objects", "03.bin"))
    storage.remove(storage.join(root, "objects"))
    assert not storage.exists(storage.join(root, "objects"))
    assert storage.list_names(root) == ["table.parquet"]
    assert {request.fault for request in faulty_s3.faulted()} == {name(faults)}


def test_a_large_object_is_one_request(faulty_s3: FaultProxy, root: str) -> None:
    """A multipart upload could not recover from a lost final answer."""
    data = bytes(101 << 20)  # s3fs would use a multipart upload
    storage.write_bytes(storage.join(root, "large"), data)
    assert storage.read_bytes(storage.join(root, "large")) == data
    assert [request.method for request in faulty_s3.log] == ["PUT", "GET"]


def test_a_lease_outlives_faults(impatient: None, faulty_s3: FaultProxy, root: str) -> None:
    faulty_s3.faults = ALL_AT_ONCE
    for _ in range(3):
        with Lease.acquire(root, "extract") as lease:
            lease.check()


# --- exactly once ------------------------------------------------------------------------------------------------


def test_of_racing_creators_one_creates_at_most(impatient: None, faulty_s3: FaultProxy, root: str) -> None:
    """A creator that reports success has its bytes stored. After a lost answer, possibly no creator does."""
    faulty_s3.faults = ALL_AT_ONCE
    creators, rounds = 5, 12
    start = threading.Barrier(creators)

    def create(creator: int) -> list[bool]:
        created = []
        for i in range(rounds):
            start.wait()
            created.append(storage.create_bytes(storage.join(root, str(i)), bytes([creator]) * 20_000))
        return created

    with ThreadPoolExecutor(creators) as pool:
        by_round = list(zip(*pool.map(create, range(creators)), strict=True))
    owners = [data[0] for data in storage.read_many([storage.join(root, str(i)) for i in range(rounds)])]
    for i, (created, owner) in enumerate(zip(by_round, owners, strict=True)):
        assert [creator for creator, did in enumerate(created) if did] in ([], [owner])
        assert storage.read_bytes(storage.join(root, str(i))) == bytes([owner]) * 20_000
    assert sum(map(any, by_round)) > rounds / 2
    assert faulty_s3.faulted()


def test_a_creator_whose_answer_was_lost_finds_its_own_object(faulty_s3: FaultProxy, root: str) -> None:
    faulty_s3.faults, faulty_s3.only = Faults(reset_after=1.0), once("PUT")
    assert storage.create_bytes(storage.join(root, "a"), b"mine") is False
    assert storage.read_bytes(storage.join(root, "a")) == b"mine"
    assert len(faulty_s3.puts(f"{storage.name(root)}/a")) == 2


def test_a_conflict_decides_nothing(faulty_s3: FaultProxy, root: str) -> None:
    faulty_s3.faults, faulty_s3.only = Faults(conflict=1.0), once("PUT")
    assert storage.create_bytes(storage.join(root, "a"), b"mine") is True
    assert [request.status for request in faulty_s3.puts()] == [409, 200]


def test_many_are_deleted_by_the_thousand(faulty_s3: FaultProxy, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_MAX_DELETED", 3)
    uris = [storage.join(root, str(i)) for i in range(8)]
    for uri in uris:
        storage.write_bytes(uri, b"x")
    faulty_s3.faults, faulty_s3.only = Faults(slow_down=1.0), once("POST")
    storage.remove_many(uris)
    assert storage.list_names(root) == []
    assert [request.status for request in faulty_s3.requests("POST")] == [503, 200, 200, 200]


def test_what_the_store_did_not_delete_is_asked_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single deletions of a batch can fail although the request succeeds."""
    uris = [storage.join(root, str(i)) for i in range(4)]
    call, asked = s3.S3._call_s3, []
    spared = {"0", "3"}

    async def sparing(self: s3.S3, method: str, *arguments: object, **options: Any) -> Any:
        if method != "delete_objects":
            return await call(self, method, *arguments, **options)
        keys = [entry["Key"] for entry in options["Delete"]["Objects"]]
        asked.append([storage.name(key) for key in keys])
        errors = [{"Key": key, "Code": "InternalError"} for key in keys if storage.name(key) in spared]
        if len(asked) == 2:
            spared.clear()
        return {"Errors": errors}

    monkeypatch.setattr(s3.S3, "_call_s3", sparing)
    storage.remove_many(uris)
    assert asked == [["0", "1", "2", "3"], ["0", "3"], ["0", "3"]]
    spared.add("1")
    monkeypatch.setattr(s3.S3, "retries", 3)
    with pytest.raises(OSError, match=f"{uris[1]}: could not be deleted: InternalError"):
        storage.remove_many(uris)


# --- permanent faults --------------------------------------------------------------------------------------------


def test_waiting_ends_within_two_minutes() -> None:
    assert bound_s() < 120


@pytest.fixture
def hopeless(impatient: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reduces retries as well, so that permanent failures take seconds."""
    monkeypatch.setattr(s3.S3, "retries", 3)
    monkeypatch.setattr(s3.S3, "connect_timeout", 0.5)
    return


def open_and_read(uri: str) -> bytes:
    with storage.open_input(uri) as stream:
        return stream.read()


OPERATIONS: dict[str, Callable[[str], object]] = {
    "write": lambda uri: storage.write_bytes(uri, b"new"),
    "write much": lambda uri: storage.write_bytes(uri, bytes(16_000_000)),
    "create": lambda uri: storage.create_bytes(uri, b"new"),
    "read": storage.read_bytes,
    "read many": lambda uri: storage.read_many([uri] * 100),
    "open": open_and_read,
    "exists": storage.exists,
    "is file": storage.is_file,
    "size": storage.size_bytes,
    "list names": storage.list_names,
    "list files": lambda uri: storage.list_files(uri, [""]),
    "remove": storage.remove,
}


@pytest.mark.parametrize("fault", ["error_500", "slow_down", "reset_before", "cut_body", "black_hole"])
def test_what_cannot_succeed_is_one_line_in_bounded_time(
    hopeless: None, faulty_s3: FaultProxy, root: str, fault: str
) -> None:
    uri = storage.join(root, "object")
    storage.write_bytes(uri, b"old")
    faulty_s3.faults = Faults(**{fault: 1.0})

    def fail(operation: Callable[[str], object]) -> float:
        start = time.monotonic()
        with pytest.raises(OSError, match=rf"^{uri}[^\n]*: [^\n]+$"):
            operation(uri)
        return time.monotonic() - start

    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        took_s = dict(zip(OPERATIONS, pool.map(fail, OPERATIONS.values()), strict=True))
    # Twice, since reading many objects waits for requests in flight after a failure; plus 30 s for a busy machine.
    assert max(took_s.values()) < 2 * bound_s() + 30, took_s

    faulty_s3.faults = Faults()
    if fault != "cut_body":  # a cut answer follows a successful request
        assert storage.read_bytes(uri) == b"old"


def test_a_store_that_is_not_there_is_one_line(
    hopeless: None, s3_bucket: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    uris._s3.cache_clear()
    with pytest.raises(OSError, match=rf"^{root}: Could not connect to the endpoint URL: [^\n]+$"):
        storage.exists(root)
    uris._s3.cache_clear()
