from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefill_router import corpus, storage
from prefill_router.corpus import CorpusPlan, Row
from prefill_router.errors import UserError

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "name a river"}]
LONG = "long prompt " * 20_000  # 240,000 characters


def rows_of(plan: CorpusPlan) -> list[Row]:
    return [row for shard in plan.shards for row in corpus.read_shard(shard)]


def read_all(path: Path, shard_rows: int = 100) -> list[Row]:
    return rows_of(corpus.plan(str(path), shard_rows))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int | None = None) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_rows(folder: Path, suffix: str, rows: list[tuple[str, str]]) -> Path:
    """The rows (prompt_id, prompt) as a file of each format, in the ways that make a reader stumble."""
    path = folder / f"corpus{suffix}"
    ids, prompts = [r[0] for r in rows], [r[1] for r in rows]
    if suffix == ".parquet":
        return write_parquet(path, {"extra": ids, "prompt": prompts, "prompt_id": ids}, row_group_size=3)
    if suffix == ".jsonl":
        lines = [json.dumps({"prompt": p, "prompt_id": i}, ensure_ascii=False) for i, p in rows]
        return write(path, "\ufeff\n" + "\r\n\n".join(lines))
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\r\n\r\n").writerows([("prompt_id", "extra", "prompt")])
    csv.writer(stream, lineterminator="\r\n\n").writerows((i, "", p) for i, p in rows)
    return write(path, "\ufeff" + stream.getvalue())


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", corpus.SUFFIXES)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 14),
)
@example(['say "hi",\r\nthen\n\nleave', "ü\u2028ß", " ", "\ufeffbom", "plain"], 2)
def test_the_shards_hold_every_row_once_in_order(suffix: str, prompts: list[str], shard_rows: int) -> None:
    rows = [(f"p{i}", prompt) for i, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        plan = corpus.plan(str(write_rows(Path(folder), suffix, rows)), shard_rows)
        assert [(row.prompt_id, row.prompt) for row in rows_of(plan)] == rows
    assert plan.num_rows == len(rows)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    assert all(shard.num_rows == shard_rows for shard in plan.shards[:-1])


@pytest.mark.parametrize("suffix", corpus.SUFFIXES)
def test_a_corpus_is_read_from_every_storage(root: str, tmp_path: Path, suffix: str) -> None:
    rows = [(f"p{i}", f"prompt\n{i}") for i in range(7)]
    uri = storage.join(root, f"remote{suffix}")
    storage.write_bytes(uri, write_rows(tmp_path, suffix, rows).read_bytes())
    read = rows_of(corpus.plan(uri, 3))
    assert [(row.prompt_id, row.prompt) for row in read] == rows


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "prompt\nthree\nfour\n")
    write_jsonl(tmp_path / "c.jsonl", {"prompt": "five"})
    write_parquet(tmp_path / "a.parquet", {"prompt": ["one", "two"]})
    write(tmp_path / "README.md", "no corpus")
    plan = corpus.plan(str(tmp_path), 10)
    assert [row.prompt for row in rows_of(plan)] == ["one", "two", "three", "four", "five"]
    assert [shard.num_rows for shard in plan.shards] == [2, 2, 1]


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 6, 100])
def test_limit_takes_the_first_rows(tmp_path: Path, limit: int) -> None:
    write_parquet(tmp_path / "a.parquet", {"prompt": ["1", "2", "3"]})
    write(tmp_path / "b.csv", "prompt\n4\n5\n6\n")
    plan = corpus.plan(str(tmp_path), 2, limit)
    assert [row.prompt for row in rows_of(plan)] == list("123456")[:limit]
    assert plan.num_rows == min(limit, 6)


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}\n{"prompt": 3}\n')
    assert corpus.plan(str(path), 10, limit=1).num_rows == 1


def test_messages_are_read_without_further_columns(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", {"messages": [CHAT, CHAT[1:]], "note": ["x", "y"]})
    jsonl = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "note": 1}, {"messages": CHAT[1:]})
    for path in (parquet, jsonl):
        assert [row.prompt for row in read_all(path)] == [CHAT, CHAT[1:]]


def test_messages_win_over_a_prompt_where_a_row_has_both(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": ["bare", "bare"], "messages": [CHAT, None]})
    assert [row.prompt for row in read_all(path)] == [CHAT, "bare"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_long_prompt_is_read_whole(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix, [("p0", LONG), ("p1", "short")])
    assert [row.prompt for row in read_all(path)] == [LONG, "short"]


# --- ids ---------------------------------------------------------------------------------------------------------


def test_a_prompt_without_id_gets_a_hash_of_its_content(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", {"prompt": ["one", "two", "one"]})
    csv_file = write(tmp_path / "b.csv", "prompt\none\n")
    first, second, third = read_all(parquet)
    assert first.id_is_hash
    assert first.prompt_id == third.prompt_id == read_all(csv_file)[0].prompt_id
    assert first.prompt_id != second.prompt_id
    assert len(first.prompt_id) == 32


def test_messages_hash_by_their_content(tmp_path: Path) -> None:
    turned = [{"content": m["content"], "role": m["role"]} for m in CHAT]
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": turned}, {"messages": CHAT[1:]})
    first, second, third = read_all(path)
    assert first.prompt_id == second.prompt_id != third.prompt_id


def test_repeated_content_is_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": p} for p in "abacaa"))
    assert corpus.plan(str(path), 2).num_repeated == 3
    given_ids = write_jsonl(tmp_path / "b.jsonl", *({"prompt": "a", "prompt_id": i} for i in "xyz"))
    assert corpus.plan(str(given_ids), 2).num_repeated == 0


def test_an_id_that_stands_twice_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", *({"prompt_id": f"p{i}", "prompt": "x"} for i in range(5)))
    write_jsonl(tmp_path / "b.jsonl", *({"prompt_id": f"p{i}", "prompt": "x"} for i in (7, 3, 9)))
    with pytest.raises(UserError, match=r'b\.jsonl: prompt_id "p3" stands more than once'):
        corpus.plan(str(tmp_path), 2)


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_missing_corpus_is_an_error(root: str) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such corpus"):
        corpus.plan(storage.join(root, "nowhere.csv"), 10)


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", ""), ("a.csv", "prompt\n\n"), ("a.jsonl", "\n \n"), ("README.md", "no corpus")]
)
def test_an_empty_corpus_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(UserError, match=r"the corpus is empty: .*\.parquet, \.jsonl, \.csv"):
        corpus.plan(str(tmp_path), 10)


def test_an_empty_parquet_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the corpus is empty"):
        read_all(write_parquet(tmp_path / "a.parquet", {"prompt": pa.array([], pa.string())}))


@pytest.mark.parametrize("name", ["a.txt", "corpus", "a.csv.gz"])
def test_an_unknown_format_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"a corpus is one of \.parquet, \.jsonl, \.csv"):
        read_all(write(tmp_path / name, "prompt\nx\n"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["x", None]}, "row 2: prompt = null, must be a non-empty string"),
        ({"prompt": ["x", ""]}, 'row 2: prompt = "", must be a non-empty string'),
        ({"prompt": [7, 8]}, "row 1: prompt = 7, must be a non-empty string"),
        ({"prompt": ["x", "y"], "prompt_id": ["a", None]}, "row 2: prompt_id = null, must be a non-empty string"),
        ({"prompt": ["x"], "prompt_id": [1]}, "row 1: prompt_id = 1, must be a non-empty string"),
        ({"text": ["x"]}, "row 1: has neither prompt nor messages"),
        ({"messages": [CHAT, []]}, r"row 2: messages = \[\], must be a non-empty list"),
        ({"messages": ["hello"]}, 'row 1: messages = "hello", must be a non-empty list'),
        ({"messages": [[{"role": "user", "content": None}]]}, r"messages\[0\]\.content = null, must be a string"),
        ({"messages": [[{"role": None, "content": "x"}]]}, r"messages\[0\]\.role = null, must be a non-empty string"),
        ({"messages": [[{"role": "user"}]]}, r"messages\[0\] = .*, must have role and content"),
        ({"messages": [CHAT, None]}, "row 2: prompt = null, must be a non-empty string"),
    ],
)
def test_an_unfit_parquet_row_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.parquet: .*{message}"):
        read_all(write_parquet(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "x"}\n\n{"prompt": 3}', "row 2: prompt = 3, must be a non-empty string"),
        ('{"prompt": ""}', 'row 1: prompt = "", must be a non-empty string'),
        ('{"prompt": "x"}\n{"prompt": ', "row 2: not JSON"),
        ('["prompt"]', "row 1: must be a JSON object with prompt or messages"),
        ('{"id": 1}', "row 1: has neither prompt nor messages"),
        ('{"prompt": "x", "prompt_id": 7}', "row 1: prompt_id = 7, must be a non-empty string"),
        ('{"messages": {"role": "user"}}', "row 1: messages = .*, must be a non-empty list"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"messages\[0\]\.content = .*, must be"),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}', "byte 28: not UTF-8"),
        ('{"prompt": "x"}\n{"prompt": "half an emoji: \\ud83d"}', "row 2: prompt"),
    ],
)
def test_an_unfit_jsonl_row_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl: .*{message}"):
        read_all(write(tmp_path / "a.jsonl", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt\nx\n""\n', "row 2: prompt = null, must be a non-empty string"),
        ("prompt_id,prompt\na,\n", "row 1: prompt = null, must be a non-empty string"),
        ("prompt_id,prompt\n,x\n", "row 1: prompt_id = null, must be a non-empty string"),
        ("text\nx\n", "row 1: has neither prompt nor messages"),
        ('prompt\nx\n"never closed\n', "not CSV"),
        (b"prompt\nx\n\xff\n", "byte 9: not UTF-8"),
        # What would cut a prompt at its first comma, or give a row another id than the file means.
        ("prompt_id,prompt\na,x\nb,one, two\n", "row 2: "),
        ("prompt,prompt_id\nx,a\ny\n", "row 2: "),
    ],
)
def test_an_unfit_csv_row_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.csv: .*{message}"):
        read_all(write(tmp_path / "a.csv", text))


def test_what_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        read_all(write(tmp_path / "a.parquet", "prompt\nx\n"))


def test_a_bad_value_is_shown_short(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": ["x" * 10_000]})
    with pytest.raises(UserError) as error:
        read_all(path)
    assert len(str(error.value)) < 300
