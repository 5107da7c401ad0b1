from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import write, write_jsonl, write_parquet, write_rows
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus import formats, reader
from prefill_router.corpus.plan import CorpusPlan, plan, read_shard
from prefill_router.corpus.reader import BadRow, Row, content_hash
from prefill_router.corpus.row_keys import row_keys

Record = tuple[str | None, str | None]  # prompt_id, prompt


def rows_of(planned: CorpusPlan) -> list[Row]:
    return [row for shard in planned.shards for row in read_shard(shard)]


def repeats_of(planned: CorpusPlan) -> list[tuple[str, str, int]]:
    """Each repeated row as (prompt_id, content, shard)."""
    return [row for part in planned.repeats for row in zip(part.prompt_ids, part.contents, part.sources, strict=True)]


def digest_of(prompt_ids: Sequence[str], contents: Sequence[str]) -> str:
    parts = (
        hashlib.blake2b(prompt_id.encode(), digest_size=8).digest() + bytes.fromhex(content)
        for prompt_id, content in zip(prompt_ids, contents, strict=True)
    )
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


# --- every row once ----------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """The expected outcome for each row, from a simple reference implementation."""

    kept: list[tuple[str, str]]
    repeats: list[tuple[str, str]]
    bad: list[tuple[str, int]]


def expected(files: dict[str, tuple[list[Record], bool]]) -> Expected:
    result = Expected([], [], [])
    content_of_id: dict[str, str] = {}
    seen: set[str] = set()
    for uri, (records, with_ids) in files.items():
        for row, (prompt_id, prompt) in enumerate(records):
            if not (prompt and prompt.strip()) or (with_ids and not prompt_id):
                result.bad.append((uri, row))
                continue
            content = content_hash(prompt)
            name = prompt_id if with_ids and prompt_id else content
            if name in content_of_id and not name == content == content_of_id[name]:
                result.bad.append((uri, row))
                continue
            content_of_id.setdefault(name, content)
            (result.repeats if content in seen else result.kept).append((name, content))
            seen.add(content)
    return result


RECORDS = st.lists(
    st.tuples(
        st.sampled_from([None, "", content_hash("a"), content_hash("b")]) | st.integers(0, 30).map("p{}".format),
        st.sampled_from([None, "", " ", "a", "b", "c,\nd", "ü"]) | st.integers(0, 30).map("prompt {}".format),
    ),
    min_size=1,
    max_size=12,
)
FILES = st.lists(st.tuples(st.sampled_from(formats.SUFFIXES), RECORDS, st.booleans()), min_size=1, max_size=3)


def write_files(folder: Path, files: list[tuple[str, list[Record], bool]]) -> dict[str, tuple[list[Record], bool]]:
    written = {}
    for i, (suffix, records, with_ids) in enumerate(files):
        path = write_rows(folder / f"{i}{suffix}", records, with_ids=with_ids)
        written[str(path)] = (records, with_ids)
    return written


@settings(max_examples=150, deadline=None)
@given(FILES, st.integers(1, 14))
def test_each_row_is_in_a_shard_repeated_or_invalid(
    files: list[tuple[str, list[Record], bool]], shard_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outcome = expected(write_files(Path(folder), files))
        if not outcome.kept:
            with pytest.raises(UserError, match="is valid; the first: "):
                plan(folder, shard_rows)
            return
        planned = plan(folder, shard_rows)
        rows = rows_of(planned)
        all_good = plan(folder, shard_rows, keep_repeats=True)
        contents = [row.content_digest for row in rows_of(all_good)]
        assert len(contents) == len(outcome.kept) + len(outcome.repeats)
        assert all_good.is_first.tolist() == [content not in contents[:i] for i, content in enumerate(contents)]
        assert planned.is_first.all()
        assert len(planned.is_first) == len(rows)
    assert planned.num_rows == sum(len(records) for _, records, _ in files)
    assert [(row.prompt_id, row.content_digest.hex()) for row in rows] == outcome.kept
    assert [(bad.uri, bad.row) for bad in planned.bad] == outcome.bad
    assert all_good.bad == planned.bad
    repeats = repeats_of(planned)
    assert sorted((prompt_id, content) for prompt_id, content, _ in repeats) == sorted(outcome.repeats)
    assert planned.num_repeated == all_good.num_repeated == len(repeats)


@settings(max_examples=50, deadline=None)
@given(FILES, st.integers(1, 14))
def test_the_parts_of_a_plan_match_its_description(
    files: list[tuple[str, list[Record], bool]], shard_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "first.jsonl", '{"prompt": "a"}')
        write_files(Path(folder), files)
        planned = plan(folder, shard_rows)
        rows = [read_shard(shard) for shard in planned.shards]
    kept = [row for part in rows for row in part]
    contents = [row.content_digest.hex() for row in kept]
    np.testing.assert_array_equal(planned.keys, row_keys([row.prompt_id for row in kept], contents))
    repeated = [row_keys(part.prompt_ids, part.contents) for part in planned.repeats]
    there = np.concatenate([planned.keys, *repeated])
    assert planned.has(there).all()
    others = there ^ np.array([0, 0, 1], np.uint64)
    assert planned.has(np.concatenate([others, there])).tolist() == [False] * len(there) + [True] * len(there)
    spans = [kept[span] for shard, span in planned.spans()]
    assert spans == rows
    for shard, part in zip(planned.shards, rows, strict=True):
        assert shard.rows == len(part) > 0
        assert shard.digest == digest_of([r.prompt_id for r in part], [r.content_digest.hex() for r in part])
    order = [(source, contents.index(content)) for _, content, source in repeats_of(planned)]
    assert order == sorted(order)
    for _, content, source in repeats_of(planned):
        assert content in {row.content_digest.hex() for row in rows[source]}
    assert all(len(part.prompt_ids) == shard_rows for part in planned.repeats[:-1])
    assert [part.digest for part in planned.repeats] == [
        digest_of(part.prompt_ids, part.contents) for part in planned.repeats
    ]


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_a_corpus_is_planned_on_every_storage(root: str, tmp_path: Path, suffix: str) -> None:
    rows: list[Record] = [(f"p{i}", f"prompt\n{i % 5}") for i in range(7)]
    uri = storage.join(root, f"remote{suffix}")
    storage.write_bytes(uri, write_rows(tmp_path / f"corpus{suffix}", rows).read_bytes())
    planned = plan(uri, 3)
    assert [(row.prompt_id, row.prompt) for row in rows_of(planned)] == rows[:5]
    assert repeats_of(planned) == [("p5", content_hash("prompt\n0"), 0), ("p6", content_hash("prompt\n1"), 0)]


# --- the cut -----------------------------------------------------------------------------------------------------


def test_a_folder_is_cut_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "prompt\nthree\nfour\n")
    write_jsonl(tmp_path / "c.jsonl", {"prompt": "five"})
    write_parquet(tmp_path / "a.parquet", {"prompt": ["one", "two"]})
    write(tmp_path / "README.md", "no corpus")
    planned = plan(str(tmp_path), 10)
    assert [row.prompt for row in rows_of(planned)] == ["one", "two", "three", "four", "five"]
    assert [shard.rows for shard in planned.shards] == [5]


def test_small_files_share_shards_and_large_ones_are_cut_alone(tmp_path: Path) -> None:
    sizes = [1, 2, 3, 1, 8, 2, 0, 2, 4, 1, 5]
    for i, size in enumerate(sizes):
        rows = [{"prompt_id": f"{i}-{j}", "prompt": None if (i, j) == (1, 0) else f"{i} {j}"} for j in range(size)]
        write_jsonl(tmp_path / f"{i:02d}.jsonl", *rows)
    planned = plan(str(tmp_path), 4)
    of_files = [[(Path(e.uri).stem, e.num_rows) for e in shard.extents] for shard in planned.shards]
    assert of_files == [
        [("00", 1), ("01", 2)],
        [("02", 3), ("03", 1)],
        [("04", 4)],
        [("04", 4)],
        [("05", 2), ("07", 2)],
        [("08", 4)],
        [("09", 1)],
        [("10", 4)],
        [("10", 1)],
    ]
    assert [shard.rows for shard in planned.shards] == [2, 4, 4, 4, 4, 4, 1, 4, 1]
    assert rows_of(planned) == list(rows_of(plan(str(tmp_path), 100)))
    assert planned.shards[0].places == [(str(tmp_path / "00.jsonl"), 0), (str(tmp_path / "01.jsonl"), 1)]
    write_jsonl(tmp_path / "11.jsonl", {"prompt": "another"})
    assert plan(str(tmp_path), 4).shards[:-1] == planned.shards


def test_a_row_that_becomes_invalid_moves_no_other(tmp_path: Path) -> None:
    prompts: list[str | None] = ["a", "b", "c", "d", "e", "f"]
    before = plan(str(write_parquet(tmp_path / "a.parquet", {"prompt": prompts})), 2)
    prompts[2] = None
    after = plan(str(write_parquet(tmp_path / "a.parquet", {"prompt": prompts})), 2)
    assert [s.digest for s in after.shards][::2] == [s.digest for s in before.shards][::2]
    assert after.shards[1].extents[0].left_out == (0,)
    prompts[3] = None
    assert plan(str(write_parquet(tmp_path / "a.parquet", {"prompt": prompts})), 2).shards == after.shards[::2]


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_appended_rows_change_the_digest_of_the_last_run_alone(
    suffix: str, num_rows: int, more: int, shard_rows: int
) -> None:
    rows: list[Record] = [(f"p{i}", f"prompt {i}") for i in range(num_rows + more)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        before = plan(str(write_rows(path, rows[:num_rows])), shard_rows).shards
        after = plan(str(write_rows(path, rows)), shard_rows).shards
    whole = num_rows // shard_rows
    assert [s.digest for s in after[:whole]] == [s.digest for s in before[:whole]]
    assert {s.digest for s in after[whole:]}.isdisjoint(s.digest for s in before)


def test_digests_do_not_depend_on_the_format_or_on_other_files(tmp_path: Path) -> None:
    rows: list[Record] = [(f"p{i}", f"prompt {i}") for i in range(5)]
    digests = [s.digest for s in plan(str(write_rows(tmp_path / "m.parquet", rows)), 2).shards]
    for suffix in formats.SUFFIXES:
        folder = tmp_path / f"with{suffix}"
        folder.mkdir()
        write_rows(folder / f"m{suffix}", rows)
        write_jsonl(folder / "a.jsonl", {"prompt": "x"}, {"prompt": None})
        write(folder / "z.csv", "prompt\ny\n")
        assert [s.digest for s in plan(str(folder), 2).shards][1:-1] == digests


def test_any_change_of_a_row_changes_the_digest(tmp_path: Path) -> None:
    variants = [["a", "x"], ["a", "y"], ["b", "x"], ["x", "a"]]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", {"prompt_id": v[0], "prompt": v[1]}) for i, v in enumerate(variants)]
    files.append(write_jsonl(tmp_path / "none.jsonl", {"prompt": "x"}))
    files.append(write_jsonl(tmp_path / "two.jsonl", {"prompt": "x"}, {"prompt": "y"}))
    files.append(write_jsonl(tmp_path / "turned.jsonl", {"prompt": "y"}, {"prompt": "x"}))
    assert len({plan(str(path), 2).shards[0].digest for path in files}) == len(files)


def test_by_default_shards_grow_in_the_first_file_to_those_of_a_fixed_size(tmp_path: Path) -> None:
    for name, num_rows in (("a", 1400), ("b", 300), ("c", 20), ("d", 30)):
        write_parquet(tmp_path / f"{name}.parquet", {"prompt": [f"{name}{i}" for i in range(num_rows)]})
    growing, fixed = plan(str(tmp_path)).shards, plan(str(tmp_path), 256).shards
    assert [shard.rows for shard in growing] == [16] * 16 + [64] * 12 + [256, 120] + [256, 44] + [50]
    assert growing[28:] == fixed[4:]
    assert [shard.rows for shard in plan(str(tmp_path), default_rows=40).shards[:18]] == [16] * 16 + [40] * 2


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 6, 100])
def test_limit_takes_the_first_rows_good_or_bad(tmp_path: Path, limit: int) -> None:
    write_parquet(tmp_path / "a.parquet", {"prompt": ["1", None, "3"]})
    write(tmp_path / "b.csv", "prompt\n4\n5\n6\n")
    planned = plan(str(tmp_path), 2, limit)
    assert [row.prompt for row in rows_of(planned)] == [p for p in "1 3456"[:limit] if p != " "]
    assert planned.num_rows == min(limit, 6)


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}\n{"prompt": 3}\n')
    assert plan(str(path), 10, limit=1).bad == []


def test_huge_prompts_are_invalid(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "x" * 11}, {"prompt": "x" * 10})
    planned = plan(str(path), 10, max_prompt_bytes=10)
    assert [bad.row for bad in planned.bad] == [0]
    assert [row.prompt for row in read_shard(planned.shards[0], max_prompt_bytes=10)] == ["x" * 10]


def test_a_plan_takes_few_bytes_a_row(tmp_path: Path) -> None:
    small, large = (peak_bytes_of_a_plan(num_rows, tmp_path) for num_rows in (20_000, 120_000))
    assert (large - small) / 100_000 < 40


def peak_bytes_of_a_plan(num_rows: int, folder: Path) -> int:
    """Measured in a separate process, where nothing else allocates."""
    path = write(folder / "a.csv", "prompt\n" + "".join(f"prompt {i}\n" for i in range(num_rows)))
    script = f"""
import tracemalloc
from prefill_router.corpus.plan import plan
tracemalloc.start()
assert plan({str(path)!r}, 1000).num_rows == {num_rows}
print(tracemalloc.get_traced_memory()[1])
"""
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


# --- repeated prompts and conflicting ids ------------------------------------------------------------------------


def test_a_prompt_with_two_ids_is_kept_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", *({"prompt": p, "prompt_id": i} for i, p in zip("ijk", "xyx", strict=True)))
    write(tmp_path / "b.csv", "prompt\nz\nz\ny\n")
    planned = plan(str(tmp_path), 2)
    assert [row.prompt for row in rows_of(planned)] == ["x", "y", "z"]
    assert repeats_of(planned) == [
        ("k", content_hash("x"), 0),
        (content_hash("y"), content_hash("y"), 0),
        (content_hash("z"), content_hash("z"), 1),
    ]
    assert planned.bad == []
    kept = plan(str(tmp_path), 2, keep_repeats=True)
    assert [row.prompt for row in rows_of(kept)] == ["x", "y", "x", "z", "z", "y"]
    assert (kept.num_repeated, kept.repeats) == (3, [])


def test_a_repeated_id_makes_the_later_row_invalid(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", *({"prompt_id": f"p{i}", "prompt": f"x{i}"} for i in range(5)))
    write_jsonl(tmp_path / "b.jsonl", *({"prompt_id": f"p{i}", "prompt": p} for i, p in ((7, "y"), (3, "x3"), (9, ""))))
    planned = plan(str(tmp_path), 2)
    uri = str(tmp_path / "b.jsonl")
    assert planned.bad[0] == BadRow(uri, 1, "p3", 'prompt_id "p3" occurs more than once: ids must be unique')
    assert [bad.row for bad in planned.bad] == [1, 2]
    assert planned.num_repeated == 0
    planned.check_bad(planned.bad, 0.5)
    message = r'2 of 8 rows are invalid.*b\.jsonl: row 2: prompt_id "p3" occurs more than once'
    with pytest.raises(UserError, match=message):
        planned.check_bad(planned.bad, 0.2)


def test_an_id_that_is_the_hash_of_a_later_row_makes_that_row_invalid(tmp_path: Path) -> None:
    taken = content_hash("y")
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt_id": taken, "prompt": "x"}, {"prompt": "y"}, {"prompt": "z"})
    planned = plan(str(path), 2)
    assert [(bad.row, bad.prompt_id) for bad in planned.bad] == [(1, taken)]
    assert [row.prompt for row in rows_of(planned)] == ["x", "z"]


def test_different_ids_with_the_same_64_bits_do_not_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = reader.id_digest
    monkeypatch.setattr(
        "prefill_router.corpus.row_keys.id_digest", lambda i: real("p") if i.startswith("p") else real(i)
    )
    rows = [{"prompt_id": f"p{i}", "prompt": f"x{i}"} for i in (0, 1, 2, 1)]
    planned = plan(str(write_jsonl(tmp_path / "a.jsonl", *rows)), 2)
    assert [bad.row for bad in planned.bad] == [3]
    assert [row.prompt_id for row in rows_of(planned)] == ["p0", "p1", "p2"]


def test_different_prompts_with_the_same_first_64_bits_are_no_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reader.content_digest
    monkeypatch.setattr(reader, "content_digest", lambda prompt: bytes(8) + real(prompt)[8:])
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": p} for p in "xyzy"))
    assert [row.prompt for row in rows_of(plan(str(path), 2))] == list("xyz")


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_missing_corpus_is_an_error(root: str) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such corpus"):
        plan(storage.join(root, "nowhere.csv"), 10)


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", ""), ("a.csv", "prompt\n\n"), ("a.jsonl", "\n \n"), ("README.md", "no corpus")]
)
def test_an_empty_corpus_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(UserError, match=r"the corpus is empty: .*\.parquet, .*\.jsonl, .*\.csv"):
        plan(str(tmp_path), 10)


def test_an_empty_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": pa.array([], pa.string())})
    with pytest.raises(UserError, match="the corpus is empty"):
        plan(str(path), 10)


def test_a_corpus_without_a_valid_row_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": None}, {"prompt": 3})
    with pytest.raises(UserError, match=r"none of 2 rows is valid; the first: .*: row 1: prompt = null"):
        plan(str(path), 10)


def test_a_file_that_changes_while_it_is_planned_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": "x", "prompt_id": i} for i in "abc"))

    def read_and_change(*arguments: Any, **options: Any) -> Iterator[tuple[int, int, Row | BadRow]]:
        yield from reader.read(*arguments, **options)
        write_jsonl(path, *({"prompt": "x", "prompt_id": i} for i in "ade"))

    monkeypatch.setattr("prefill_router.corpus.scan.read", read_and_change)
    with pytest.raises(UserError, match=r"a\.jsonl: .*changed while the job was running"):
        plan(str(path), 10)


@pytest.mark.parametrize(
    "records",
    [
        [{"prompt": "a"}, {"prompt": None}],  # fewer rows
        [{"prompt": "a"}, {"prompt": None}, {"prompt": "other"}],
        [{"prompt": "a"}, {"prompt": None}, {"prompt": "b", "prompt_id": "other"}],
        [{"prompt": "a"}, {"prompt": None}, {"prompt": ""}],
    ],
)
def test_a_file_that_changed_after_the_plan_is_an_error(tmp_path: Path, records: list[dict[str, str]]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": None}, {"prompt": "b"})
    (shard,) = plan(str(path), 10).shards
    write_jsonl(path, *records)
    with pytest.raises(UserError, match=r"a\.jsonl: .*changed while the job was running"):
        read_shard(shard)


def test_rows_that_were_left_out_may_change(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": None}, {"prompt": "b"})
    (shard,) = plan(str(path), 10).shards
    write_jsonl(path, {"prompt": "a"}, {"prompt": "now good"}, {"prompt": "b"})
    assert [row.prompt for row in read_shard(shard)] == ["a", "b"]


def test_keys_are_three_words_a_row() -> None:
    content = content_hash("x")
    keys = row_keys(["a", "b"], [content, content])
    assert keys.shape == (2, 3)
    assert keys.dtype == np.uint64
    assert int(keys[1, 0]) == reader.prompt_hash("b")
    assert keys[:, 1:].astype("<u8").tobytes().hex() == content * 2
    assert row_keys([], []).shape == (0, 3)
