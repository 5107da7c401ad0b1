from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefill_router import storage
from prefill_router.activations import commit_log, commit_segments
from prefill_router.activations.commit_log import CommitLog, RecordLocation
from prefill_router.activations.commit_records import Commit, RejectedPrompt, bad_rows, shard_name
from prefill_router.activations.reuse import Sources
from prefill_router.common.errors import UserError
from prefill_router.corpus.row_keys import RowKeys
from prefill_router.storage import parquet_objects

COLUMNS = ["last_001", "mean_003"]


def keys_of(seed: int, rows: int) -> RowKeys:
    return np.random.default_rng(seed).integers(0, 1 << 64, (rows, 3), np.uint64)


def record(seed: int, columns: list[str] = COLUMNS, digest: str = "") -> Commit:
    """A record as a worker writes it: each fifth has no valid row, and each third has one refused row."""
    rows = 0 if seed % 5 == 4 else 1 + seed % 3
    name = shard_name(digest or f"rows-{seed}", columns)
    file = parquet_objects.ShardFile(
        name=parquet_objects.file_name(name), rows=rows, bytes=100 + seed, sha256=f"{seed:064x}"
    )
    refused = RejectedPrompt(uri="c.jsonl", row=seed, prompt_id=f"p{seed}", content="0" * 32, reason="no")
    return Commit(
        name=name,
        file=file if rows else None,
        columns=columns,
        num_tokens=10 * rows,
        truncated=list(range(rows // 2)),
        keys=Commit.encode_keys(keys_of(seed, rows)),
        refused=[refused] if seed % 3 == 0 else [],
    )


RECORDS = [record(seed) for seed in range(10)]


def committed(uri: str, records: Iterable[Commit]) -> CommitLog:
    """A commit log after its driver has received these records from its workers."""
    opened = CommitLog.open(uri)
    for each in records:
        opened.add(commit_log.commit(uri, each))
    return opened


def gathered(uri: str, records: Iterable[Commit]) -> CommitLog:
    opened = committed(uri, records)
    opened.gather()
    return opened


def stored(uri: str) -> list[Commit]:
    """All records at `uri`, as a worker reads them."""
    opened = CommitLog.open(uri)
    return [commit_log.read(uri, place) for place in opened.places(np.arange(len(opened)))]


def by_name(records: Iterable[Commit]) -> list[Commit]:
    return sorted(records, key=lambda each: each.name)


def loose(uri: str) -> list[str]:
    return [name for name in storage.list_names(storage.join(uri, "commits")) if name.endswith(".json")]


def in_segments(uri: str) -> list[str]:
    return storage.list_names(storage.join(uri, "commits", "segments"))


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_log, "SEGMENT_RECORDS", 4)


# --- gathering ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_segments")
def test_records_are_read_from_segments_and_loose_files(root: str) -> None:
    opened = committed(root, RECORDS)
    assert len(opened) == 10
    assert len(loose(root)) == 2
    assert len(in_segments(root)) == 4  # two segments, each with records and keys
    assert by_name(stored(root)) == by_name(RECORDS)


@pytest.mark.usefixtures("small_segments")
def test_a_record_keeps_its_position(root: str) -> None:
    opened = CommitLog.open(root)
    names = [each.name for each in RECORDS]
    for number, each in enumerate(RECORDS):
        opened.add(commit_log.commit(root, each))
        assert opened.positions(names).tolist() == [*range(number + 1), *([-1] * (9 - number))]
    keys = dict(opened.keys(np.arange(10)))
    for position, each in enumerate(RECORDS):
        np.testing.assert_array_equal(keys[position], each.row_keys)
    assert [position for position, _ in opened.keys(np.array([9, 2, 5]))] == [2, 5, 9]
    files = [each.file and each.file.name for each in RECORDS]
    assert opened.records["file"].to_pylist() == files
    assert opened.positions([files[3] or ""], "file").tolist() == [3]


def test_the_table_says_what_the_records_do(root: str) -> None:
    records = gathered(root, RECORDS).records
    assert records["rows"].to_pylist() == [each.rows for each in RECORDS]
    assert records["num_truncated"].to_pylist() == [len(each.truncated) for each in RECORDS]
    assert list(bad_rows(records)) == [refused.to_bad_row() for each in RECORDS for refused in each.refused]
    assert CommitLog.open(root).column_sets == [COLUMNS]


def test_a_log_without_records_is_empty(root: str) -> None:
    opened = CommitLog.open(root)
    opened.gather()
    assert (len(opened), opened.records.num_rows, opened.column_sets) == (0, 0, [])
    assert opened.positions(["a"]).tolist() == [-1]
    assert list(opened.keys(np.arange(0))) == []
    assert in_segments(root) == []


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Simulates a kill at the `step`-th change of the storage; returns a function that counts the changes."""
    steps = 0

    def killed(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(uri: Any, *arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                if change is remove_many:
                    change(uri[: len(uri) // 2])
                raise Killed
            return change(uri, *arguments)

        return changed

    remove_many = storage.remove_many
    for name in ("write_bytes", "create_bytes", "remove", "remove_many"):
        monkeypatch.setattr(storage, name, killed(getattr(storage, name)))
    return lambda: steps


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("step", range(1, 20))
def test_a_kill_while_records_are_gathered_loses_none(tmp_path: Path, step: int) -> None:
    uri = str(tmp_path)
    for each in RECORDS[:7]:
        commit_log.commit(uri, each)
    with pytest.MonkeyPatch.context() as patch:
        count = killing(patch, step)
        try:
            CommitLog.open(uri).gather()
        except Killed:
            pass
        else:
            assert count() < step
    assert by_name(stored(uri)) == by_name(RECORDS[:7])
    gathered(uri, RECORDS[7:])
    assert loose(uri) == []
    assert by_name(stored(uri)) == by_name(RECORDS)
    CommitLog.open(uri).tidy([each.name for each in RECORDS])
    assert len(in_segments(uri)) % 2 == 0  # no keys without records
    assert by_name(stored(uri)) == by_name(RECORDS)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("step", range(1, 20))
def test_a_kill_while_a_log_is_tidied_loses_no_record_to_keep(tmp_path: Path, step: int) -> None:
    uri = str(tmp_path)
    committed(uri, RECORDS)
    keep = RECORDS[2:4] + RECORDS[7:9]
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, step)
        with suppress(Killed):
            CommitLog.open(uri).tidy([each.name for each in keep])
    assert {each.name for each in stored(uri)} >= {each.name for each in keep}
    CommitLog.open(uri).tidy([each.name for each in keep])
    assert by_name(stored(uri)) == by_name(keep)


def test_records_that_two_writers_gathered_count_once(root: str) -> None:
    first = committed(root, RECORDS[:6])
    second = CommitLog.open(root)
    first.gather()
    second.add(commit_log.commit(root, RECORDS[6]))
    second.gather()
    opened = CommitLog.open(root)
    assert len(opened) == 13
    assert len(set(opened.positions([each.name for each in RECORDS[:7]]).tolist())) == 7
    opened.tidy([each.name for each in RECORDS[:7]])
    assert by_name(stored(root)) == by_name(RECORDS[:7])


def test_a_record_that_is_loose_and_in_a_segment_counts_once(root: str) -> None:
    """A writer that lost its lease may commit a shard again after its record was gathered."""
    gathered(root, RECORDS[:3])
    commit_log.commit(root, RECORDS[1])
    opened = CommitLog.open(root)
    assert len(opened) == 3
    opened.add(commit_log.commit(root, RECORDS[3]))
    opened.gather()
    assert loose(root) == []
    assert by_name(stored(root)) == by_name(RECORDS[:4])


def test_the_first_of_two_commits_of_a_shard_is_kept(root: str) -> None:
    first, second = RECORDS[0], RECORDS[0].model_copy(update={"refused": []})
    assert commit_log.commit(root, first) == first
    assert commit_log.commit(root, second) == first
    assert commit_log.find(root, first.name) == first
    assert commit_log.find(root, "0" * 32) is None


def test_a_record_that_is_gathered_while_another_commits_it_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "create_bytes", lambda *_: False)
    assert commit_log.commit(str(tmp_path), RECORDS[0]) == RECORDS[0]


def test_a_log_that_is_gathered_while_it_is_opened_is_complete(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = committed(root, RECORDS)
    read_many = storage.read_many

    def slow(uris: list[str]) -> list[bytes]:
        if uris and uris[0].endswith(".json"):
            writer.gather()
        return read_many(uris)

    monkeypatch.setattr(storage, "read_many", slow)
    assert len(CommitLog.open(root)) == 10


def test_a_record_that_was_gathered_since_is_found(root: str) -> None:
    opened = committed(root, RECORDS)
    places = opened.places(np.arange(10))
    assert {place.segment for place in places} == {None}
    opened.gather()
    assert [commit_log.read(root, place) for place in places] == RECORDS
    with pytest.raises(UserError, match="the record of shard nowhere is missing: run extract again"):
        commit_log.read(root, RecordLocation("nowhere", None))


# --- damage ------------------------------------------------------------------------------------------------------


def only(uri: str, suffix: str) -> str:
    (name,) = (name for name in in_segments(uri) if name.endswith(suffix))
    return storage.join(uri, "commits", "segments", name)


@pytest.mark.parametrize("damaged", [b"", b"PAR1", b"\0" * 1000])
def test_a_damaged_segment_is_one_line_and_can_be_removed(root: str, damaged: bytes) -> None:
    gathered(root, RECORDS)
    path = only(root, ".parquet")
    storage.write_bytes(path, damaged)
    with pytest.raises(UserError) as error:
        CommitLog.open(root)
    text = str(error.value)
    assert text == f"{path}: is damaged: remove {path}, and the shards that it records are computed again"
    storage.remove(path)
    assert len(CommitLog.open(root)) == 0


def test_damaged_keys_are_an_error_where_they_are_wanted(root: str) -> None:
    opened = gathered(root, RECORDS)
    path = only(root, ".keys")
    storage.write_bytes(path, storage.read_bytes(path)[:-1] + b"?")
    with pytest.raises(UserError, match=r"\.keys: is damaged: remove .*\.parquet, and the shards"):
        list(opened.keys(np.arange(10)))
    storage.write_bytes(path, storage.read_bytes(path)[:-25])
    last = max(i for i, each in enumerate(RECORDS) if each.rows)
    with pytest.raises(UserError, match=r"\.keys: is damaged"):
        commit_log.read(root, *opened.places(np.array([last])))


@pytest.mark.parametrize(
    "damaged", [b"", b"{}", RECORDS[0].model_dump_json().replace('"keys":"', '"keys":"A').encode()]
)
def test_a_damaged_record_is_one_line(root: str, damaged: bytes) -> None:
    committed(root, RECORDS[:1])
    storage.write_bytes(storage.join(root, "commits", f"{RECORDS[0].name}.json"), damaged)
    with pytest.raises(
        UserError, match=r"\.json: is not a valid shard record: remove it, and the shard is computed again$"
    ):
        CommitLog.open(root)


# --- tidying -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_segments")
def test_only_segments_with_dropped_records_are_written_again(root: str) -> None:
    for each in RECORDS:
        if each.file:
            storage.write_bytes(storage.join(root, each.file.name), b"")
    opened = committed(root, RECORDS)
    before = set(in_segments(root))
    keep = RECORDS[:6] + RECORDS[9:]
    opened.tidy([each.name for each in keep])
    after = set(in_segments(root))
    assert len(after & before) == 2
    assert len(after) == 4
    assert by_name(stored(root)) == by_name(keep)
    files = {name for name in storage.list_names(root) if name.startswith("part-")}
    assert files == {each.file.name for each in keep if each.file}
    opened.tidy([])
    assert in_segments(root) == loose(root) == []


@pytest.mark.usefixtures("small_segments")
def test_many_loose_records_of_an_earlier_version_are_gathered_by_tidy(root: str) -> None:
    for each in RECORDS:
        commit_log.commit(root, each)
    CommitLog.open(root).tidy([each.name for each in RECORDS])
    assert loose(root) == []
    assert by_name(stored(root)) == by_name(RECORDS)


def test_clear_leaves_nothing(root: str) -> None:
    gathered(root, RECORDS)
    commit_log.clear(root)
    assert storage.list_names(root) == []


# --- sources -----------------------------------------------------------------------------------------------------


def test_a_shard_of_the_plan_is_found_without_keys(root: str) -> None:
    """Shards with other columns; their prompts are in no other shard of the plan."""
    other = ["last_001"]
    opened = gathered(root, [record(seed, other, f"rows-{seed}") for seed in range(4)])
    storage.remove(only(root, ".keys"))
    sources = Sources(opened, [f"rows-{seed}" for seed in range(6)])
    names = [shard_name(f"rows-{seed}", other) for seed in range(4)]
    for index in range(6):
        assert [place.name for place in sources.of(index, keys_of(index, 2))] == names[index : index + 1]


def test_prompts_of_records_that_the_plan_does_not_know_are_found_by_content(root: str) -> None:
    opened = gathered(root, RECORDS[:4])
    opened.add(RECORDS[5])
    sources = Sources(opened, ["rows-3", "new"])
    keys = np.concatenate([keys_of(1, 2)[1:], keys_of(5, 3)[:1], keys_of(3, 1), keys_of(77, 4)])
    keys[:, 0] = 0  # ids are ignored
    assert {place.name for place in sources.of(1, keys)} == {RECORDS[1].name, RECORDS[5].name}
    assert sources.of(1, keys_of(77, 4)) == ()


def test_keys_are_read_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume over shards of the plan reads no keys, however many are pending."""
    gathered(str(tmp_path), RECORDS[:5])
    monkeypatch.setattr(commit_segments.Segment, "read_keys", lambda _: pytest.fail("keys were read"))
    opened = CommitLog.open(str(tmp_path))
    sources = Sources(opened, [f"rows-{seed}" for seed in range(10)])
    assert [sources.of(index, keys_of(index, 2)) for index in range(5, 10)] == [()] * 5
