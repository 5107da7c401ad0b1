"""Files of rows, and merging of small files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefill_router import storage
from prefill_serve.gateway.state.row_files import MOST_FILES, SMALL_BYTES, RowFolder

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def encode(rows: Sequence[str]) -> bytes:
    return json.dumps(list(rows)).encode()


def decode(data: bytes) -> list[str]:
    return [str(row) for row in json.loads(data)]


@pytest.fixture
def segments(tmp_path: Path) -> RowFolder[str]:
    return RowFolder(str(tmp_path / "rows"), ".json", encode, decode)


def write_many(segments: RowFolder[str], num_files: int) -> list[str]:
    """Writes one row per file, a second apart."""
    rows = [f"row-{i}" for i in range(num_files)]
    for i, row in enumerate(rows):
        segments.write([row], NOON + timedelta(seconds=i))
    return rows


def num_files(segments: RowFolder[str]) -> int:
    return len(list(Path(segments.uri).iterdir()))


def test_a_folder_that_is_not_there_has_no_rows(segments: RowFolder[str]) -> None:
    assert list(segments.read()) == []
    segments.merge(NOON)
    segments.forget(NOON)


def test_rows_come_back_the_oldest_file_first(segments: RowFolder[str]) -> None:
    segments.write(["c"], NOON + timedelta(seconds=2))
    segments.write(["a", "b"], NOON)
    assert list(segments.read()) == ["a", "b", "c"]


def test_files_of_one_second_are_in_order(segments: RowFolder[str]) -> None:
    rows = [f"row-{i:02}" for i in range(20)]
    for i, row in enumerate(rows):
        segments.write([row], NOON + timedelta(microseconds=i))
    assert list(segments.read()) == rows


def test_files_of_one_moment_do_not_overwrite_each_other(segments: RowFolder[str]) -> None:
    segments.write(["a"], NOON)
    segments.write(["b"], NOON)
    assert sorted(segments.read()) == ["a", "b"]


def test_a_few_files_stay_as_they_are(segments: RowFolder[str]) -> None:
    write_many(segments, MOST_FILES - 1)
    segments.merge(NOON)
    assert num_files(segments) == MOST_FILES - 1


def test_many_small_files_become_one_with_the_same_rows(segments: RowFolder[str]) -> None:
    rows = write_many(segments, MOST_FILES)
    segments.merge(NOON + timedelta(hours=1))
    assert num_files(segments) == 1
    assert list(segments.read()) == rows


def test_a_merged_file_is_older_than_what_is_written_after_it(segments: RowFolder[str]) -> None:
    rows = write_many(segments, MOST_FILES)
    segments.merge(NOON + timedelta(hours=1))
    segments.write(["last"], NOON + timedelta(hours=2))
    assert list(segments.read()) == [*rows, "last"]


def test_large_files_are_not_merged_again(segments: RowFolder[str]) -> None:
    large = "x" * SMALL_BYTES
    segments.write([large], NOON - timedelta(hours=1))
    rows = write_many(segments, MOST_FILES)
    segments.merge(NOON + timedelta(hours=1))
    assert num_files(segments) == 2
    assert list(segments.read()) == [large, *rows]


def test_files_of_others_are_left_alone(segments: RowFolder[str]) -> None:
    rows = write_many(segments, MOST_FILES)
    other, draft = Path(segments.uri) / "notes.txt", Path(segments.uri) / ".20260301T120000-x.json.draft"
    other.write_text("mine")
    draft.write_bytes(b"[half of")
    segments.merge(NOON + timedelta(hours=1))
    segments.forget(NOON + timedelta(minutes=1))
    assert list(segments.read()) == rows
    assert other.read_text() == "mine"
    assert draft.exists()


def test_a_merge_that_dies_before_it_removes_loses_nothing(segments: RowFolder[str]) -> None:
    rows = write_many(segments, MOST_FILES)
    left = {path: path.read_bytes() for path in Path(segments.uri).iterdir()}
    segments.merge(NOON + timedelta(hours=1))
    for path, data in left.items():  # as after a crash before they were removed
        path.write_bytes(data)
    assert sorted(segments.read()) == sorted([*rows, *rows])
    RowFolder(segments.uri, ".json", encode, decode).merge(NOON + timedelta(hours=2))
    assert num_files(segments) == 1
    assert set(segments.read()) == set(rows)


def test_what_was_written_before_is_forgotten(segments: RowFolder[str]) -> None:
    segments.write(["old"], NOON - timedelta(seconds=1))
    segments.write(["new"], NOON)
    segments.forget(NOON)
    assert list(segments.read()) == ["new"]


def test_a_writer_lists_its_files_once(segments: RowFolder[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of an object store takes as long as a write, and each size is a request."""
    write_many(segments, 2)
    monkeypatch.setattr(storage, "list_names", lambda _uri: pytest.fail("the files are listed again"))
    monkeypatch.setattr(storage, "size_bytes", lambda _uri: pytest.fail("a size is asked for again"))
    rows = write_many(segments, MOST_FILES)
    segments.merge(NOON + timedelta(hours=1))
    segments.forget(NOON + timedelta(minutes=30))
    monkeypatch.undo()
    assert set(segments.read()) == set(rows)
    assert num_files(segments) == 1


def test_a_file_that_somebody_removed_is_noticed_when_files_are_merged(segments: RowFolder[str]) -> None:
    write_many(segments, MOST_FILES)
    next(Path(segments.uri).iterdir()).unlink()
    with pytest.raises(FileNotFoundError):
        segments.merge(NOON + timedelta(hours=1))
    segments.write(["one more"], NOON + timedelta(hours=1))
    segments.merge(NOON + timedelta(hours=2))
    assert num_files(segments) == 1
    assert len(list(segments.read())) == MOST_FILES
