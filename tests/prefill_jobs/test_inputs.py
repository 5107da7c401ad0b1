"""Real-world input files through each command, on disk and S3: read, quarantined with a reason, or one error line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from collected import write_pool_of
from corpora import packed
from prefill_jobs.collect.collect_job import collect
from prefill_jobs.extract.extract_job import extract
from prefill_jobs.label.label_job import label
from prefill_jobs.options import CollectConfig, ExtractConfig, LabelConfig
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus.quarantine import read_quarantine
from upstream import Upstream

pytestmark = pytest.mark.usefixtures("in_process", "one_thread")

GOOD = "what is one plus {}"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "what is one plus two"}]}]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is one plus two"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@dataclass(frozen=True)
class Input:
    """Files of a corpus and the expected result: rows read, reasons for quarantined rows, or the whole error."""

    files: Mapping[str, bytes]
    rows: int = 0
    bad: tuple[str, ...] = ()  # prefixes of the reasons
    error: str | None = None  # part of the error line
    of: str = ""  # path below the corpus that is passed to the command; the whole corpus by default
    said: str = ""
    columns: tuple[str, ...] = field(default=())  # for `--by`


def jsonl(*records: Any) -> bytes:
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode()


def prompts(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt_id": f"p{i}", "prompt": GOOD.format(i)} for i in range(start, start + number)]


def text_csv(rows: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    return stream.getvalue().encode(encoding)


def parquet(**columns: Any) -> bytes:
    return storage.encode_parquet(pa.table(columns))


def arrow(new: Any) -> bytes:
    table = pa.table({"prompt": [GOOD.format(i) for i in range(3)]})
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def damaged(data: bytes) -> bytes:
    return data[:100] + b"\xee" * 200 + data[300:]


CSV = [["prompt_id", "prompt"], ["a", "what is one, plus two"], ["b", "name a river; quickly"]]
MANY = parquet(prompt=[GOOD.format(i) + " more" * 50 for i in range(200)])
SPECIAL = "a[1] *?%+=#{}.jsonl"

INPUTS: dict[str, Input] = {
    # Formats.
    "jsonl": Input({"a.jsonl": jsonl(*prompts(3))}, 3),
    "one-file": Input({"a.jsonl": jsonl(*prompts(3))}, 3, of="a.jsonl"),
    "ndjson": Input({"a.ndjson": jsonl(*prompts(3))}, 3),
    "json-list": Input({"a.json": json.dumps(prompts(3), indent=1).encode()}, 3),
    "json-lines-named-json": Input({"a.json": jsonl(*prompts(3))}, 3),
    "csv": Input({"a.csv": text_csv(CSV)}, 2),
    "csv-semicolons": Input({"a.csv": text_csv(CSV, ";")}, 2),
    "csv-tabs": Input({"a.csv": text_csv(CSV, "\t")}, 2),
    "tsv": Input({"a.tsv": text_csv(CSV, "\t")}, 2),
    "csv-utf16": Input({"a.csv": text_csv(CSV, ";", "utf-16")}, 2),
    "csv-padded-header": Input({"a.csv": text_csv([[" prompt_id", " prompt "], *CSV[1:]])}, 2),
    "csv-messages": Input({"a.csv": text_csv([["messages"], [json.dumps(CHAT)], [json.dumps(PARTS)]])}, 2),
    "parquet": Input({"a.parquet": parquet(prompt=["name a river", "name a lake"])}, 2),
    "parquet-numbered": Input({"a.parquet": parquet(prompt_id=[1, 2], prompt=["name a river", "name a lake"])}, 2),
    "parquet-messages": Input({"a.parquet": parquet(messages=[CHAT])}, 1),
    "parquet-messages-in-text": Input({"a.parquet": parquet(messages=[json.dumps(CHAT)])}, 1),
    "parquet-struct": Input(
        {"a.parquet": parquet(prompt=["name a lake"], metadata=[{"country": "de"}])}, 1, columns=("metadata.country",)
    ),
    "arrow-stream": Input({"a.arrow": arrow(pa.ipc.new_stream)}, 3),
    "feather": Input({"a.feather": arrow(pa.ipc.new_file)}, 3),
    "gz": Input({"a.jsonl.gz": packed(Path("a.gz"), jsonl(*prompts(9)))}, 9),
    "zst": Input({"a.csv.zst": packed(Path("a.zst"), text_csv(CSV))}, 2),
    "bz2": Input({"a.jsonl.bz2": packed(Path("a.bz2"), jsonl(*prompts(9)))}, 9),
    # Requests to APIs.
    "parts": Input({"a.jsonl": jsonl({"model": "m", "messages": PARTS})}, 1),
    "tool-calls": Input({"a.jsonl": jsonl({"messages": [*CHAT, CALL]})}, 1),
    "anthropic": Input({"a.jsonl": jsonl({"model": "m", "system": "be brief", "messages": PARTS})}, 1),
    "responses": Input({"a.jsonl": jsonl({"model": "m", "input": "name a river", "instructions": "be brief"})}, 1),
    "batch": Input({"a.jsonl": jsonl({"custom_id": "1", "method": "POST", "url": "/v1", "body": {"input": "a"}})}, 1),
    "logged": Input({"a.jsonl": jsonl({"request": {"model": "m", "messages": PARTS}, "response": {}})}, 1),
    # Folders.
    "hive": Input(
        {f"day={day}/country=de/a.jsonl": jsonl(*prompts(2, 2 * day)) for day in (1, 2)}, 4, columns=("country", "day")
    ),
    "many-small": Input({f"{i}.jsonl": jsonl(*prompts(1, i)) for i in range(40)}, 40),
    "mixed": Input(
        {
            "a.jsonl": jsonl(*prompts(2)),
            "b.docx": b"x",
            "info.json": b'{\n "a": 1\n}',
            "_SUCCESS": b"",
            "README.md": b"",
        },
        2,
        said="skipped 3 files of ",
    ),
    "special-names": Input({SPECIAL: jsonl(*prompts(2)), "a1.jsonl": jsonl(*prompts(1, 2))}, 2, of=SPECIAL),
    # Rows.
    "null": Input({"a.jsonl": jsonl(*prompts(2), {"prompt": None})}, 2, ("prompt = null, ",)),
    "blank": Input({"a.jsonl": jsonl(*prompts(2), {"prompt": " \n"})}, 2, ('prompt = " \\n", must hold more',)),
    "no-prompt": Input({"a.jsonl": jsonl(*prompts(2), {"text": "x"})}, 2, ("has neither prompt nor messages",)),
    "not-utf8": Input({"a.jsonl": jsonl(*prompts(2)) + b'{"prompt": "\xff"}\n'}, 2, ("prompt = ",)),
    "not-json": Input({"a.jsonl": jsonl(*prompts(2)) + b'{"prompt": "x"\n'}, 2, ("not JSON: ",)),
    "image": Input(
        {"a.jsonl": jsonl(*prompts(2), {"messages": [{"role": "user", "content": [IMAGE]}]})},
        2,
        ("messages[0].content holds ",),
    ),
    "twice": Input(
        {"a.jsonl": jsonl(*prompts(2), {"prompt_id": "p0", "prompt": "x"})},
        2,
        ('prompt_id "p0" occurs more than once',),
    ),
    "gigantic": Input({"a.jsonl": jsonl(*prompts(2), {"prompt": "x" * (1 << 21)})}, 2, ('prompt = "xxx',)),
    "comma": Input({"a.csv": text_csv(CSV) + b"c,one, two\n"}, 2, ("has 3 values, but the header names 2",)),
    # Errors.
    "missing": Input({}, error="no such "),
    "empty-file": Input({"a.jsonl": b""}, error="the corpus is empty"),
    "nothing-readable": Input({"a.docx": b"x"}, error="the corpus is empty"),
    "unknown-format": Input({"a.docx": b"x"}, of="a.docx", error="a.docx: unsupported format: use one of .parquet"),
    "no-prompt-column": Input({"a.csv": b"text,id\nx,1\n"}, error="a.csv: has neither prompt nor messages among its"),
    "damaged-parquet": Input({"a.parquet": damaged(MANY)}, error="a.parquet: is damaged"),
    "not-parquet": Input({"a.parquet": b"<html>" * 9}, error="a.parquet: not a Parquet file"),
    "cut-gz": Input({"a.jsonl.gz": gzip.compress(os.urandom(999))[:-40]}, error="a.jsonl.gz: cannot be decompressed"),
    "open-quote": Input({"a.csv": b'prompt\n"x\n'}, error="a.csv: near byte "),
    "cut-json": Input({"a.json": b'[{"prompt": "x"}'}, error="a.json: near character 16: not JSON: ends early"),
    "all-bad": Input({"a.jsonl": jsonl({"prompt": 1}, {"prompt": 2})}, error="none of 2 rows is valid"),
}

# What depends on the storage: how files are listed, opened, read in parts and named in errors.
ON_S3 = [
    *((name, "extract") for name in ("one-file", "hive", "many-small", "mixed", "special-names")),
    *((name, "extract") for name in ("csv", "json-list", "parquet", "arrow-stream", "gz", "zst", "bz2", "not-utf8")),
    *((name, "extract") for name in ("missing", "empty-file", "damaged-parquet", "cut-gz", "open-quote")),
    *((name, command) for name in ("hive", "gz", "null", "missing") for command in ("label", "collect")),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}
        yield write_pool_of(tmp_path_factory.mktemp("pool") / "pool.toml", upstreams)


def run(command: str, corpus: str, out: str, tiny_model: Path, router: str, pool: str, by: tuple[str, ...]) -> int:
    """The rows of the output."""
    if command == "extract":
        config = ExtractConfig(corpus=corpus, encoder=str(tiny_model), out=out, max_bad_fraction=0.9)
        return extract(config)[config.out].manifest.rows
    if command == "label":
        columns = ",".join(by) or None
        return label(LabelConfig(router=router, log=corpus, out=out, max_bad_fraction=0.9, by=columns)).lines
    manifest = collect(CollectConfig(corpus=corpus, pool=pool, out=out, max_output_tokens=50))
    assert manifest.missing == 0
    return sum(spending.answers for spending in manifest.spending.values()) // 2


@pytest.mark.slow("fifty inputs through each command")
@pytest.mark.parametrize("command", ["extract", "label", "collect"])
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_read_or_quarantined_or_refused_in_a_line(
    name: str,
    command: str,
    tiny_model: Path,
    router: str,
    pool: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(name, command, str(tmp_path), tiny_model, router, pool, capsys)


@pytest.mark.parametrize(("name", "command"), ON_S3)
def test_an_input_in_a_bucket_is_read_as_on_disk(
    name: str,
    command: str,
    s3_bucket: str,
    tiny_model: Path,
    router: str,
    pool: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(name, command, f"{s3_bucket}/{uuid.uuid4().hex}", tiny_model, router, pool, capsys)


def check(
    name: str, command: str, root: str, tiny_model: Path, router: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = INPUTS[name]
    for file, data in given.files.items():
        storage.write_bytes(storage.join(root, "in", file), data)
    corpus = storage.join(root, "in", *([given.of] if given.of else []))
    out = storage.join(root, "out")
    if given.error is not None:
        with pytest.raises(UserError) as refused:
            run(command, corpus, out, tiny_model, router, pool, given.columns)
        assert given.error in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600
        return
    assert run(command, corpus, out, tiny_model, router, pool, given.columns) == given.rows
    reasons = [bad.reason for bad in read_quarantine(out)]
    assert len(reasons) == len(given.bad)
    assert all(reason.startswith(begin) for reason, begin in zip(reasons, given.bad, strict=True))
    assert given.said in capsys.readouterr().err
