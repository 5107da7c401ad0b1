from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import os
import random
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpora import CHAT, write, write_jsonl, write_parquet, write_rows
from prefill_router import storage
from prefill_router.common.errors import InvalidRowError, UserError
from prefill_router.corpus import formats, reader, text_files
from prefill_router.corpus.reader import BadRow, Found, Row, corpora, find, refuse_output, require_corpus
from prefill_router.storage import parquet_files

LONG = "long prompt " * 20_000  # 240,000 characters
UNICODE = st.characters(exclude_categories=["Cs"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=8,
)


def read(path: Path | str, **options: Any) -> list[Row | BadRow]:
    return [row for _, _, row in reader.read(str(path), **options)]


def good(path: Path | str, **options: Any) -> list[Row]:
    """Returns the rows, which must all be valid."""
    rows = read(path, **options)
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row for row in rows if isinstance(row, Row)]


def only_bad(path: Path, **options: Any) -> BadRow:
    """Returns the only invalid row."""
    (bad,) = [row for row in read(path, **options) if isinstance(row, BadRow)]
    assert bad.uri == str(path)
    return bad


def not_utf8(*values: bytes | None, kind: pa.DataType) -> pa.Array:
    """A text column with values that its writer did not validate."""
    return pa.array(values, pa.binary()).view(pa.string()).cast(kind)


# --- valid rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(UNICODE, max_size=12).map(lambda text: f"{text}."), min_size=1, max_size=12), st.data())
@example(['say "hi",\r\nthen\n\nleave', "ü\u2028ß", " a", "\ufeffbom", "nu\0l", "plain"], None)
def test_every_row_is_read_once_and_can_be_found_again(
    suffix: str, prompts: list[str], data: st.DataObject | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / f"corpus{suffix}", [(f"p{i}", p) for i, p in enumerate(prompts)])
        rows = list(reader.read(str(path)))
        assert [(row, item) for row, _, item in rows] == [
            (i, Row(f"p{i}", prompt, False)) for i, prompt in enumerate(prompts)
        ]
        begin = data.draw(st.integers(0, len(rows) - 1)) if data else 3
        num_rows = data.draw(st.integers(0, len(rows))) if data else 2
        assert list(reader.read(str(path), begin, num_rows, rows[begin][1])) == rows[begin : begin + num_rows]


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_a_corpus_is_read_from_every_storage(root: str, tmp_path: Path, suffix: str) -> None:
    rows = [(f"p{i}", f"prompt\n{i}") for i in range(7)]
    uri = storage.join(root, f"remote{suffix}")
    storage.write_bytes(uri, write_rows(tmp_path / f"corpus{suffix}", rows).read_bytes())
    found = list(reader.read(uri))
    assert [(item.prompt_id, item.prompt) for _, _, item in found if isinstance(item, Row)] == rows
    assert list(reader.read(uri, 4, None, found[4][1])) == found[4:]


def test_messages_are_read_without_further_columns(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", {"messages": [CHAT, CHAT[1:]], "note": ["x", "y"]})
    jsonl = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "note": 1}, {"messages": CHAT[1:]})
    for path in (parquet, jsonl):
        assert [row.prompt for row in good(path)] == [CHAT, CHAT[1:]]


def test_messages_take_precedence_over_a_prompt(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": ["bare", "bare"], "messages": [CHAT, None]})
    assert [row.prompt for row in good(path)] == [CHAT, "bare"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
def test_every_role_of_a_conversation(tmp_path: Path, role: str) -> None:
    messages = [{"role": role, "content": ""}, {"role": "user", "content": "go on"}]
    assert good(write_jsonl(tmp_path / "a.jsonl", {"messages": messages}))[0].prompt == messages


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_long_prompt_is_read_whole(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"corpus{suffix}", [("p0", LONG), ("p1", "short")])
    assert [row.prompt for row in good(path)] == [LONG, "short"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.large_string(), pa.string_view()])
def test_text_of_any_parquet_type(tmp_path: Path, kind: pa.DataType) -> None:
    struct = pa.struct([("role", kind), ("content", kind)])
    columns = {
        "prompt_id": pa.array(["ä", "b"], pa.string()).cast(kind),
        "prompt": pa.array(["ü", None], pa.string()).cast(kind),
        "messages": pa.array([None, [{k: v.encode() for k, v in CHAT[0].items()}]], pa.list_(struct)),
    }
    path = write_parquet(tmp_path / "a.parquet", columns)
    assert good(path) == [Row("ä", "ü", False), Row("b", CHAT[:1], False)]


# --- ids ---------------------------------------------------------------------------------------------------------


@given(st.text(UNICODE), st.lists(st.fixed_dictionaries({"role": st.text(UNICODE), "content": st.text(UNICODE)})))
def test_a_content_hash_is_sha256_of_the_text_or_of_the_messages_as_json(
    text: str, messages: list[dict[str, str]]
) -> None:
    as_json = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    assert reader.content_hash(text) == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert reader.content_hash(messages) == hashlib.sha256(as_json.encode()).hexdigest()[:32]
    assert reader.content_digest(text).hex() == reader.content_hash(text)


def test_a_prompt_without_id_gets_a_hash_of_its_content(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", {"prompt": ["one", "two", "one"]})
    csv_file = write(tmp_path / "b.csv", "prompt\none\n")
    first, second, third = good(parquet)
    assert first.id_is_hash
    assert first.prompt_id == third.prompt_id == good(csv_file)[0].prompt_id == reader.content_hash("one")
    assert first.prompt_id != second.prompt_id


def test_messages_hash_by_their_content(tmp_path: Path) -> None:
    turned = [{"content": m["content"], "role": m["role"], "name": "x"} for m in CHAT]
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": turned}, {"messages": CHAT[1:]})
    first, second, third = good(path)
    assert first.prompt_id == second.prompt_id != third.prompt_id


def test_a_digest_names_the_content_whatever_the_id(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "one", "prompt_id": "a"})
    assert [row.content_digest for row in good(path)] == [reader.content_digest("one")] * 2


# --- invalid rows ------------------------------------------------------------------------------------------------

NO_TEXT = "must be a non-empty string"


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        ({"prompt": ["x", None, "y"]}, 1, f"prompt = null, {NO_TEXT}"),
        ({"prompt": ["x", "", "y"]}, 1, f'prompt = "", {NO_TEXT}'),
        ({"prompt": ["x", " \n\u2003"]}, 1, r'prompt = " \n\u2003", must hold more than white space'),
        ({"prompt": [7]}, 0, f"prompt = 7, {NO_TEXT}"),
        ({"prompt": ["x", "y"], "prompt_id": ["a", None]}, 1, f"prompt_id = null, {NO_TEXT}"),
        ({"prompt": ["x", "y"], "prompt_id": ["a", ""]}, 1, f'prompt_id = "", {NO_TEXT}'),
        ({"prompt": ["x"], "prompt_id": [1.5]}, 0, f"prompt_id = 1.5, {NO_TEXT}"),
        ({"prompt": ["x"], "prompt_id": [True]}, 0, f"prompt_id = true, {NO_TEXT}"),
        ({"messages": [CHAT, []]}, 1, "messages = [], must be a non-empty list of role and content"),
        ({"messages": ["hello"]}, 0, 'messages = "hello", must be a non-empty list of role and content'),
        ({"messages": [[{"role": "user", "content": None}]]}, 0, "must hold more than white space"),
        ({"messages": [[{"role": "user", "content": 7}]]}, 0, "messages[0].content = 7, must be a string"),
        ({"messages": ["[not JSON"]}, 0, 'messages = "[not JSON", is text, but not JSON: '),
        ({"messages": [[{"role": None, "content": "x"}]]}, 0, "messages[0].role = null, must be one of system, "),
        ({"messages": [[{"role": "User", "content": "x"}]]}, 0, 'messages[0].role = "User", must be one of system, '),
        ({"messages": [[{"role": "user"}]]}, 0, 'messages[0] = {"role": "user"}, must have role and content'),
        ({"messages": [[{"role": "user", "content": " "}]]}, 0, "must hold more than white space"),
        ({"messages": [CHAT, None]}, 1, "has neither prompt nor messages"),
        ({"messages": [CHAT, None], "prompt": ["x", None]}, 1, f"prompt = null, {NO_TEXT}"),
    ],
)
def test_a_bad_parquet_row_is_named(tmp_path: Path, columns: dict[str, Any], row: int, reason: str) -> None:
    bad = only_bad(write_parquet(tmp_path / "a.parquet", columns))
    assert bad.row == row
    assert reason in bad.reason
    assert bad.message == f"{bad.uri}: row {row + 1}: {bad.reason}"


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ('{"prompt": "x"}\n\n{"prompt": 3}\n{"prompt": "y"}', 1, f"prompt = 3, {NO_TEXT}"),
        ('{"prompt": ""}', 0, f'prompt = "", {NO_TEXT}'),
        ('{"prompt": "x"}\n{"prompt": \n{"prompt": "y"}', 1, "not JSON: Expecting value"),
        ('{"prompt": "x"} {"prompt": "y"}\n', 0, "not JSON: more than one value"),
        ('["prompt"]', 0, "must be a JSON object"),
        ('{"id": 1}', 0, "has neither prompt nor messages"),
        ('{"prompt": "x", "prompt_id": 7.0}', 0, f"prompt_id = 7.0, {NO_TEXT}"),
        ('{"prompt": "x", "prompt_id": null}', 0, f"prompt_id = null, {NO_TEXT}"),
        ('{"messages": {"role": "user"}}', 0, 'messages = {"role": "user"}, must be a non-empty list'),
        ('{"messages": ["hello"]}', 0, 'messages[0] = "hello", must have role and content'),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', 0, "messages[0].content holds {"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', 0, 'messages[0].role = ["user"], must be one of'),
        (
            b'{"prompt": "x"}\n{"prompt": "\xff"}\n{"prompt": "y"}',
            1,
            r'prompt = "\udcff", contains a lone surrogate or',
        ),
        (b'{"prompt": "x", "prompt_id": "\xff"}', 0, r'prompt_id = "\udcff", contains a lone surrogate or bytes'),
        ('{"prompt": "x"}\n{"prompt": "half an emoji: \\ud83d"}', 1, r"emoji: \ud83d"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', 0, r'messages[0] = "\ud83d", contains a lone'),
        ("[" * 100_000 + "\n" + '{"prompt": "x"}', 0, "not JSON: maximum recursion depth"),
        ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", 0, f"prompt = {'[' * 57}..., {NO_TEXT}"),
    ],
)
def test_a_bad_jsonl_row_is_named(tmp_path: Path, text: str | bytes, row: int, reason: str) -> None:
    bad = only_bad(write(tmp_path / "a.jsonl", text))
    assert bad.row == row
    assert reason in bad.reason


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ('prompt\nx\n""\ny\n', 1, f"prompt = null, {NO_TEXT}"),
        ("prompt_id,prompt\na,\n", 0, f"prompt = null, {NO_TEXT}"),
        ("prompt_id,prompt\n,x\n", 0, f"prompt_id = null, {NO_TEXT}"),
        (b"prompt\nx\n\xff\ny\n", 1, r'prompt = "\udcff", contains a lone surrogate or bytes that are not UTF-8'),
        # Otherwise, a prompt would be cut at its first comma, or a row would get a wrong id.
        ("prompt_id,prompt\na,x\nb,one, two\nc,y\n", 1, "has 3 values, but the header names 2: quote a prompt that"),
        ("prompt,prompt_id\nx,a\ny\n", 1, "has 1 values, but the header names 2"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path: Path, text: str | bytes, row: int, reason: str) -> None:
    bad = only_bad(write(tmp_path / "a.csv", text))
    assert bad.row == row
    assert reason in bad.reason


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_a_parquet_value_that_is_not_utf8_spoils_no_other(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {
        "prompt": not_utf8(b"fine", b"\xff\xfe", "ü".encode(), None, b"y", kind=kind),
        "prompt_id": not_utf8(b"a", b"b", b"c", b"d", b"\xff", kind=kind),
    }
    first, bad, third, null, no_id = read(write_parquet(tmp_path / "a.parquet", columns))
    assert [first, third] == [Row("a", "fine", False), Row("c", "ü", False)]
    assert isinstance(bad, BadRow)
    assert bad[1:3] == (1, "b")
    assert bad.reason.startswith(r'prompt = "\udcff\udcfe", contains a lone surrogate or bytes that are not UTF-8')
    assert isinstance(null, BadRow)
    assert isinstance(no_id, BadRow)
    assert no_id[1:3] == (4, None)


def test_nested_text_that_is_not_utf8_spoils_no_other_row(tmp_path: Path) -> None:
    content = not_utf8(b"x", b"\xff", b"y", kind=pa.string())
    flat = pa.StructArray.from_arrays([pa.array(["user"] * 3), content], names=["role", "content"])
    columns = {"messages": pa.ListArray.from_arrays([0, 1, 2, 3], flat)}
    bad = only_bad(write_parquet(tmp_path / "a.parquet", columns))
    assert bad.row == 1
    assert bad.reason == "messages contains bytes that are not UTF-8"


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_a_prompt_has_a_maximum_size_in_bytes(tmp_path: Path, suffix: str) -> None:
    rows = [("a", "x" * 100), ("b", "x" * 101), ("c", "ü" * 50), ("d", "ü" * 51), ("e" * 101, "x"), ("f", "x")]
    found = read(write_rows(tmp_path / f"corpus{suffix}", list(rows)), max_prompt_bytes=100)
    assert [row.prompt_id for row in found if isinstance(row, Row)] == ["a", "c", "f"]
    reasons = [row.reason for row in found if isinstance(row, BadRow)]
    assert [reason.partition(", ")[2] for reason in reasons] == [
        f"has {size} bytes, must have at most 100" for size in (101, 102, 101)
    ]
    assert [reason.partition(" = ")[0] for reason in reasons] == ["prompt", "prompt", "prompt_id"]


def test_the_contents_of_a_conversation_have_a_maximum_total_size(tmp_path: Path) -> None:
    fits = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "ü" * 25}]
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": fits}, {"messages": [*fits, *CHAT]})
    assert only_bad(path, max_prompt_bytes=100).reason.endswith("has 120 bytes, must have at most 100")


def test_a_line_that_could_fill_the_memory_is_not_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"prompt": "one"}\n' + b"x" * 200_000_000 + b'\n{"prompt": "two"}\n')
    tracemalloc.start()
    rows = list(reader.read(str(path)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row for row, _, _ in rows] == [0, 1, 2]
    assert [item.prompt for _, _, item in rows if isinstance(item, Row)] == ["one", "two"]
    assert only_bad(path).reason == "the line must have less than 16,777,216 bytes"
    assert peak_bytes < 64_000_000
    assert list(reader.read(str(path), 2, None, rows[2][1])) == rows[2:]


def _packed(path: Path, begin: bytes, piece: bytes) -> Path:
    """Writes a small file that decompresses to 16 MB."""
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(pack[path.suffix](begin + piece * ((16 << 20) // len(piece))))
    assert path.stat().st_size < 100_000
    return path


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv.bz2", ".csv.zst", ".tsv.gz"])
@pytest.mark.parametrize("piece", [b"x", b"x" * 99 + b"\n", b'x\n","', b","], ids=["line", "lines", "values", "blanks"])
def test_a_row_of_a_table_that_could_fill_the_memory_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, piece: bytes
) -> None:
    monkeypatch.setattr(reader, "MAX_PROMPT_BYTES", 1 << 14)
    path = _packed(tmp_path / f"a{suffix}", b'prompt\n"', piece)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"near byte 7: a row must have less than 262,144 bytes: shorten it, or close"):
        read(path, max_prompt_bytes=1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_a_header_of_many_columns_is_checked_in_one_pass(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(200_000)]
    start = time.process_time()
    text_files.check_unique("t.csv", names)
    assert time.process_time() - start < 5.0  # pairwise comparison would take minutes
    with pytest.raises(UserError, match=r"t.csv: has 2 columns c7, must have one"):
        text_files.check_unique("t.csv", [*names, "c7"])


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_dictionary_is_not_unpacked_for_all_its_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """The file stores a value once; its 200 rows hold it 200 times."""
    monkeypatch.setattr(parquet_files, "_UNPACKED_BYTES", 4 << 20)
    text = "x" * (1 << 20)
    table = pa.Table.from_pylist([{column: text if column == "prompt" else [{"role": "user", "content": text}]}])
    path, options = tmp_path / "a.parquet", {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30}
    pq.write_table(pa.concat_tables([table] * 200), path, **options)
    assert path.stat().st_size < 20_000
    most_bytes = before_bytes = pa.total_allocated_bytes()
    num_good = 0
    for _, _, found in reader.read(str(path)):
        most_bytes = max(most_bytes, pa.total_allocated_bytes())
        num_good += isinstance(found, Row)
    assert num_good == 200
    assert most_bytes - before_bytes < 24 << 20


def test_rows_of_an_arrow_file_share_the_values_of_a_dictionary(tmp_path: Path) -> None:
    column = pa.array(["one " * 1000, None, "one " * 1000]).dictionary_encode()
    table = pa.table({"prompt": column, "prompt_id": ["a", "b", "c"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    first, bad, second = read(tmp_path / "a.arrow")
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert isinstance(bad, BadRow)
    assert first.prompt is second.prompt


def test_a_bad_value_is_shown_short(tmp_path: Path) -> None:
    values = ["x" * 10_000, ["x" * 10_000], list(range(10_000)), {"x" * 10_000: 1}]
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt_id": value, "prompt": value} for value in values[1:]))
    for bad in read(path):
        assert isinstance(bad, BadRow)
        assert len(bad.reason) < 120
        assert "..." in bad.reason


def test_an_invalid_row_has_its_id_if_that_is_valid(tmp_path: Path) -> None:
    records = [{"prompt": 1, "prompt_id": "a"}, {"prompt": 1, "prompt_id": 2.5}, {"prompt": 1}, 3]
    rows = read(write_jsonl(tmp_path / "a.jsonl", *records))
    assert [row.prompt_id for row in rows] == ["a", None, None, None]


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "messages", "prompt_id"]), JSON), max_size=5))
def test_no_json_stops_the_reading(records: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = read(write_jsonl(Path(folder) / "a.jsonl", *records))
    assert len(rows) == len(records)
    for row in rows:
        if isinstance(row, BadRow):
            assert row.reason.isprintable()
            assert len(row.reason) < 200
        else:
            json.dumps(row.prompt, ensure_ascii=False).encode()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=5))
def test_no_bytes_stop_the_reading_of_lines(lines: list[bytes]) -> None:
    lines = [line.replace(b"\n", b"") + b"." for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        rows = read(write(Path(folder) / "a.jsonl", b"\n".join(lines)))
    assert [type(row) for row in rows] == [BadRow] * len(lines)


def test_messages_can_be_checked_without_a_row() -> None:
    assert reader.validate_messages([{**CHAT[0], "name": "x"}]) == CHAT[:1]
    with pytest.raises(InvalidRowError, match=r'^messages\[0\]\.role = "boss", must be one of system, developer, '):
        reader.validate_messages([{"role": "boss", "content": "x"}])


# --- files that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "corpus", "a.csv.xz", "a.parquet.gz"])
def test_an_unknown_format_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"unsupported format: use one of \.parquet, .*\.jsonl, .*\.csv"):
        read(write(tmp_path / name, "prompt\nx\n"))


def test_what_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        read(write(tmp_path / "a.parquet", "prompt\nx\n"))


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", {"text": ["x"], "prompt_id": ["a"]})
    for path in (parquet, write(tmp_path / "a.csv", "text\nx\n")):
        with pytest.raises(UserError, match=rf"{path.name}: has neither prompt nor messages among its columns"):
            read(path)


def test_a_column_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    storage.write_bytes(str(tmp_path / "a.parquet"), storage.encode_parquet(twice))
    write(tmp_path / "a.csv", "prompt,prompt\nx,y\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(UserError, match=rf"{name}: has 2 columns prompt, must have one"):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ['prompt\nx\n"never closed\n', 'prompt\n"x"y\n'])
def test_a_csv_whose_quotes_do_not_match_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"a\.csv: near byte \d+: not CSV"):
        read(write(tmp_path / "a.csv", text))


def test_a_log_of_requests_is_read_as_it_is(tmp_path: Path) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "name a river"}]}]}
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 1,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    lines = [
        {"request": chat, "response": {"usage": usage}, "team": {"name": "a"}},
        {"custom_id": "c1", "body": {"model": "n", "input": "name a lake", "instructions": "be brief"}},
        {"input": "name a sea", "team.name": "b", "usage": {"completion_tokens": 3.0}},
        {"request": {"model": "m"}},
        {"prompt_id": "p", "prompt": "a prompt of a corpus"},
    ]
    path = write_jsonl(tmp_path / "log.jsonl", *lines)
    rows = read(path, extras=["model", "input_tokens", "output_tokens", "cached_tokens", "team.name"])
    assert [getattr(row, "prompt", None) for row in rows] == [
        [{"role": "user", "content": "name a river"}],
        "name a lake",
        "name a sea",
        None,
        "a prompt of a corpus",
    ]
    assert [getattr(row, "extras", None) for row in rows] == [
        ("m", 9, 3, 5, "a"),
        ("n", None, None, None, None),
        (None, None, 3.0, None, "b"),
        None,
        (None, None, None, None, None),
    ]
    assert isinstance(rows[3], BadRow)
    assert rows[3].reason == "holds no request: it has none of messages, input and prompt"


CHATS: list[tuple[Any, Any]] = [  # requests as clients send them, and the messages that are read from them
    ({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, [("user", "hi")]),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        [("user", "hi"), ("assistant", "")],
    ),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        [("user", "hi"), ("assistant", "")],
    ),
    (  # Anthropic API
        {"model": "m", "max_tokens": 9, "system": "be brief", "messages": [{"role": "user", "content": "hi"}]},
        [("system", "be brief"), ("user", "hi")],
    ),
    (
        {
            "system": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}],
            "messages": [
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "."}, {"type": "tool_use"}]},
                {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "42"}]}]},
            ],
        },
        [("system", "be\nbrief"), ("assistant", ""), ("user", "42")],
    ),
    (  # Responses API
        {
            "instructions": "be brief",
            "prompt": {"id": "a template"},
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "output": "42"},
            ],
        },
        [("system", "be brief"), ("user", "hi"), ("assistant", ""), ("assistant", ""), ("tool", "42")],
    ),
]


@pytest.mark.parametrize(("body", "messages"), CHATS)
def test_a_request_is_the_same_however_it_is_held(tmp_path: Path, body: Any, messages: Any) -> None:
    expected = Row("7", [{"role": role, "content": content} for role, content in messages], False)
    lines = write_jsonl(
        tmp_path / "a.jsonl",
        {"prompt_id": 7, **body},
        {"prompt_id": "7", "request": body, "response": {}},
        {"prompt_id": 7, "custom_id": "c", "method": "POST", "body": body},
        {"prompt_id": 7, "request": json.dumps(body)},
    )
    assert read(lines) == [expected] * 4
    for name in ("request", "body"):
        table = {"prompt_id": [7], name: [json.dumps(body)]}
        assert read(write_parquet(tmp_path / "a.parquet", table)) == [expected]
        text = io.StringIO()
        csv.writer(text, delimiter=";").writerows([table, [values[0] for values in table.values()]])
        assert read(write(tmp_path / "a.csv", text.getvalue())) == [expected]


def test_tables_hold_requests_in_structs_and_messages_in_text(tmp_path: Path) -> None:
    parts = [[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]]
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    for columns in (
        {"system": ["be brief"], "messages": parts},
        {"system": ["be brief"], "messages": [json.dumps(parts[0])]},
        {"request": [{"system": "be brief", "messages": parts[0]}]},
    ):
        assert [row.prompt for row in good(write_parquet(tmp_path / "a.parquet", columns))] == [expected]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_csv_as_spreadsheets_write_it(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [(" prompt_id", "prompt ", "note"), ("1", "größer, or; not?", ""), ("2", '"quoted"\nlines|\tbars', "x")]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    path = write(tmp_path / "a.csv", text.getvalue().encode(encoding))
    found = list(reader.read(str(path)))
    assert [row.prompt for row in good(path)] == [prompt for _, prompt, _ in rows[1:]]
    assert list(reader.read(str(path), 1, 1, found[1][1])) == found[1:]


def test_text_that_is_not_the_utf16_it_begins_as_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "x"}\n'.encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"a\.jsonl: starts as UTF-16, but is not UTF-16: truncated data"):
        read(path)


def test_a_json_list_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"prompt": "x"}, {"prompt": "y"}')
    with pytest.raises(UserError, match=r"a\.json: near character 33: not JSON: ends early"):
        read(path)


def test_json_by_lines_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json", {"prompt": "x"}, {"prompt": 7}, {"prompt": "y"})
    assert [type(row) for row in read(path)] == [Row, BadRow, Row]


def test_extras_are_read_from_structs_maps_and_folder_names(tmp_path: Path) -> None:
    folder = tmp_path / "day=2026-11-29" / "country=c%C3%B4te"
    folder.mkdir(parents=True)
    place = pa.array([{"country": "de", "city": "x"}], pa.struct([("country", pa.string()), ("city", pa.string())]))
    labels = pa.array([[("team", "a")]], pa.map_(pa.string(), pa.string()))
    columns = {"prompt": ["x"], "metadata": place, "labels": labels, "a.b": ["c"]}
    names = ["metadata.country", "labels.team", "a.b", "day", "country", "metadata.none", "nothing"]
    path = write_parquet(folder / "a.parquet", columns)
    assert good(path, extras=names)[0].extras == ("de", "a", "c", "2026-11-29", "côte", None, None)


def test_files_of_a_folder_that_are_not_read_are_found(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (folder := tmp_path / "corpus").mkdir()
    write_jsonl(elsewhere / "linked.jsonl", {"prompt": "x"})
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "z.jsonl").symlink_to(elsewhere / "linked.jsonl")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.jsonl")
    for name in ("b.ndjson", "d.tsv", "e.jsonl.bz2", "f.feather", "README.md", "_SUCCESS", ".hidden.csv"):
        (folder / name).touch()
    write(folder / "list.json", '[\n{"prompt": "x"}]')
    write(folder / "dataset_info.json", '{\n  "features": {}\n}')
    files, others = reader.find(str(folder))
    read_names = ["b.ndjson", "d.tsv", "e.jsonl.bz2", "f.feather", "link/linked.jsonl", "list.json", "z.jsonl"]
    assert [file.removeprefix(f"{folder}/") for file in files] == read_names
    names = ["README.md", "dataset_info.json", "gone.jsonl", "pipe.jsonl"]
    assert [file.removeprefix(f"{folder}/") for file in others] == names
    with pytest.raises(UserError, match=r"pipe\.jsonl: is a pipe or a device, which can be read only once"):
        reader.find(str(folder / "pipe.jsonl"))


def test_files_of_a_partitioned_corpus_are_found_at_any_depth(tmp_path: Path) -> None:
    for name in ("day=2/b.csv.gz", "day=1/a.jsonl.zst", "c.parquet", "_logs/d.jsonl", ".e.jsonl", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.removeprefix(f"{tmp_path}/") for file in reader.files(str(tmp_path))]
    assert found == ["c.parquet", "day=1/a.jsonl.zst", "day=2/b.csv.gz"]


@pytest.mark.parametrize("out", ["log", "log/", "log/labels", "log/2026/labels"])
def test_an_output_among_the_files_of_a_corpus_is_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(UserError, match=f"{out}: is inside the input folder .*log: choose another --out"):
        reader.refuse_output(f"{tmp_path}/{out}", str(tmp_path / "log"))


@pytest.mark.parametrize("out", ["logs", "labels", "log/_labels", "log/.labels", "log/../labels", "log.csv.labels"])
def test_an_output_that_would_not_be_read_is_accepted(tmp_path: Path, out: str) -> None:
    reader.refuse_output(f"{tmp_path}/{out}", str(tmp_path / "log"))


def test_an_output_in_a_bucket_is_not_inside_a_local_corpus(s3_bucket: str, tmp_path: Path) -> None:
    reader.refuse_output(f"{s3_bucket}/{tmp_path}/log/labels", str(tmp_path / "log"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.zst"])
def test_a_packed_file_that_is_damaged_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"corpus{suffix}", [(f"p{i}", f"prompt {i}" * 50) for i in range(200)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be decompressed"):
        read(path)


def test_skipped_files_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        write(tmp_path / f"{i}.docx", "")
    write_jsonl(tmp_path / "a.jsonl", {"prompt": "x"})
    reader.report_unread(str(tmp_path), "extract")
    (line,) = capsys.readouterr().err.splitlines()
    names = "0.docx, 1.docx, 2.docx, 3.docx, 4.docx and 1 more"
    assert line.startswith(f"extract: skipped 6 files of {tmp_path}: {names}: supported formats are .parquet, ")
    reader.report_unread(str(tmp_path / "a.jsonl"), "extract")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_table_whose_pages_are_damaged_is_named(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"corpus{suffix}", [(f"p{i}", f"prompt {i} " * 50) for i in range(200)])
    data = bytearray(path.read_bytes())
    data[200 : len(data) // 2] = b"\xee" * (len(data) // 2 - 200)
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"corpus\{suffix}: is damaged, or holds an unsupported type: .*: write it"):
        read(path)


def test_a_table_that_breaks_off_is_named(tmp_path: Path) -> None:
    for suffix in (".parquet", ".arrow", ".feather"):
        path = write_rows(tmp_path / f"corpus{suffix}", [(f"p{i}", f"prompt {i}") for i in range(200)])
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(UserError, match=rf"^{path}: "):
            read(path)


def test_a_row_group_of_gigabytes_is_read_in_pieces_of_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = ["".join(random.Random(i).choices("abcdefghijklmnop", k=1 << 18)) for i in range(100)]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("messages", kind)]), data_page_size=1 << 16) as writer:
        batches = [pa.record_batch([pa.array([[{"role": "user", "content": c}]], kind)], ["messages"]) for c in content]
        writer.write_table(pa.Table.from_batches(batches), row_group_size=100)  # 26 MB
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(parquet_files, "_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(parquet_files, "_PIECE_BYTES", 1 << 18)
    before_bytes = pa.total_allocated_bytes()
    most_bytes = 0
    for i, (row, _, found) in enumerate(reader.read(str(path))):
        assert (row, found.prompt if isinstance(found, Row) else None) == (i, [{"role": "user", "content": content[i]}])
        most_bytes = max(most_bytes, pa.total_allocated_bytes() - before_bytes)
    assert i == 99
    assert most_bytes < 6 << 20


def test_a_corpus_may_have_several_parts(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jsonl").write_text('{"prompt": "p"}\n')
    both = f"{tmp_path}/b,{tmp_path}/a"
    assert find(both) == Found([f"{tmp_path}/b/1.jsonl", f"{tmp_path}/a/1.jsonl"], [])
    require_corpus(both)
    with pytest.raises(UserError, match="c: no such corpus"):
        require_corpus(f"{both},{tmp_path}/c")
    with pytest.raises(UserError, match=f"is inside the input folder {tmp_path}/a"):
        refuse_output(f"{tmp_path}/a/out", both)
    (tmp_path / "x,y").mkdir()
    assert corpora(f"{tmp_path}/x,y") == [f"{tmp_path}/x,y"]  # a comma in a name
