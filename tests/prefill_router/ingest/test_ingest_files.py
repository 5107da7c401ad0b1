"""Invalid files, the output folder and the memory use of `ingest`."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import write, write_jsonl
from ingested import FIXTURES, ingest
from prefill_jobs.options import IngestConfig
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.validation import validate
from prefill_router.ingest import FORMATS, mmlu_pro, parts

HEADER = "question,model,isCorrect,output_tokens\n"


# --- files -------------------------------------------------------------------------------------------------------

RECORD = '{"index": 1, "prompt": "hi", "score": 1.0}'


@pytest.mark.parametrize(
    ("format_name", "name", "content", "message"),
    [
        ("toolkit", "t.csv", "", "is empty: a CSV must begin with the names of its columns"),
        ("toolkit", "t.csv", "question,model\n", "column isCorrect is missing; it has question, model"),
        ("toolkit", "t.csv", "question,model,model,isCorrect\n", "has 2 columns model, must have one"),
        ("toolkit", "t.csv", HEADER, "no records of format toolkit found"),
        ("toolkit", "t.csv", HEADER + '"open,m,1,5\n', "near byte 51: not CSV: unexpected end of data"),
        (
            "toolkit",
            "t.csv",
            HEADER + "hi,m,7,5\n",
            'no valid records among 1; the first error: {}: row 1: target "m": correct',
        ),
        ("toolkit", "t.csv.gz", "no gzip", "cannot be decompressed"),
        ("toolkit", "t.csv.gz", gzip.compress(b"x" * 4000, mtime=0)[:-9], "cannot be decompressed"),
        ("toolkit", "t.csv.zst", "no zstd", "cannot be decompressed"),
        ("toolkit", "t.txt", "x", "unexpected file type: format toolkit reads .csv"),
        ("routerbench", "r.csv", "sample_id,prompt,m\n", "no model found: needs columns MODEL and MODEL|total_cost"),
        ("routerbench", "r.parquet", "PAR1", "not a Parquet file"),
        (
            "routellm",
            "r.csv",
            "prompt,domain\nhi,law\n",
            "no column of true and false besides prompt: it has prompt, domain",
        ),
        ("llmrouter", "l.jsonl", "", "no records of format llmrouter found"),
        ("llmrouterbench", "b.json", "", "is empty: must hold a JSON list or object"),
        ("llmrouterbench", "b.json", "[1]", "must be a JSON object with a list of records, but is a list"),
        ("llmrouterbench", "b.json", '{"demo": false}', "has no list of records, only demo"),
        ("llmrouterbench", "b.json", f'{{"records": [{RECORD}, {{"pro', "not JSON: Unterminated string starting at"),
        ("llmrouterbench", "b.json", f'{{"records": [{RECORD}', "not JSON: ends early"),
        ("llmrouterbench", "b.json", f'{{"records": [{RECORD} 5]}}', "near character 56: not JSON: expected , or ]"),
        ("llmrouterbench", "b.json", "{7: 5}", "near character 1: not JSON: expected a key"),
        ("routerarena", "p.json", '{"a": [1]}', "must be a JSON list of predictions, but is an object"),
        ("routerarena", "p.json", '"text"', "must hold a JSON list or object, but begins with '\"'"),
        ("routerarena", "p.json", "[]\n[]", "has more than one value: if it has one per line, name it .jsonl"),
        ("routerarena", "p.json", "[" * 100_000, "not JSON: nested too deep"),
        ("lm-eval", "gsm8k.jsonl", "{}", "the file name must be samples_TASK_TIME.jsonl, as lm-eval writes it"),
        ("mmlu-pro", "model_outputs_m_5shots.zip", "PK no zip", "cannot read the zip file: File is not a zip file"),
        (
            "mmlu-pro",
            "model_outputs_m_5shots.json",
            '{"acc": 1}',
            'must hold lists of answers, but "acc" is not a list',
        ),
    ],
)
def test_a_broken_file_is_one_line(
    tmp_path: Path, format_name: str, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        ingest(format_name, path, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: ")
    assert message.replace("{}", str(path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert storage.find_files(str(tmp_path / "out")) == []


def _members(path: Path, **members: str) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path.read_bytes()


def test_a_broken_zip_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model_outputs_m_5shots.zip"

    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message):
            ingest("mmlu-pro", path, tmp_path / "out")
        assert storage.find_files(str(tmp_path / "out")) == []

    _members(path, **{"notes.txt": "-", "summary.json": "{}"})
    fails("5shots.zip: holds no JSON file with answers")
    whole = _members(path, **{"a.json": (FIXTURES / "mmlu_pro.json").read_text()})
    path.write_bytes(whole[: len(whole) // 2])
    fails("5shots.zip: cannot read the zip file")
    path.write_bytes(whole[:60] + b"\xff\xff\xff\xff" + whole[64:])
    fails("5shots.zip: cannot read the zip file")
    encrypted = bytearray(whole)
    encrypted[6] |= 1  # the encryption flag, here and in the central directory
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    fails("5shots.zip#a.json: is encrypted: unpack it first")
    path.write_bytes(whole)
    monkeypatch.setattr(mmlu_pro, "_MAX_MEMBER_BYTES", 1000)
    fails(r"5shots.zip#a.json: unpacks to [\d,]+ bytes, more than 1,000")


def test_a_broken_parquet_is_one_line(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["x" * 99] * 9, "m": [1.0] * 9, "m|total_cost": [0.0] * 9}), tmp_path / "r.parquet"
    )
    data = bytearray((tmp_path / "r.parquet").read_bytes())
    data[20:60] = bytes(40)
    (tmp_path / "r.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"r.parquet: cannot be read as Parquet"):
        ingest("routerbench", tmp_path / "r.parquet", tmp_path / "out")


def test_a_value_too_large_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_router.ingest.records.Options.max_record_bytes", 1000)
    (tmp_path / "j.json").write_text(json.dumps([{"prompt": "x" * 500_000}]))
    with pytest.raises(UserError, match=r"j.json: near character 1: not JSON: a value must have less than 1,000 bytes"):
        ingest("routerarena", tmp_path / "j.json", tmp_path / "out")
    (tmp_path / "t.csv").write_text(HEADER + "x" * 5000 + ",m,1,5\n")
    with pytest.raises(UserError, match=r"t.csv: near byte 39: a row must have less than 1,000 bytes"):
        ingest("toolkit", tmp_path / "t.csv", tmp_path / "out")
    path = write_jsonl(tmp_path / "l.jsonl", {"query": "x" * 5000}, {"query": "q", "model_name": "m", "performance": 1})
    found = ingest("llmrouter", path, tmp_path / "out")
    assert found.quarantine == [("l.jsonl", 0, None, "the line must have less than 1,000 bytes")]


def test_a_folder_of_many_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    write(source / "a.csv", HEADER + "one,m,1,5\n")
    (source / "deep" / "b.csv.gz").write_bytes(gzip.compress((HEADER + "two,m,0,5\n").encode()))
    with pa.CompressedOutputStream(str(source / "deep" / "c.CSV.zst"), "zstd") as stream:
        stream.write((HEADER + "one,m,1,5\n").encode())
    for i in range(10):
        write(source / f"x{i}.txt", "-")
    write(source / ".hidden.csv", "no CSV")
    found = ingest("toolkit", source, tmp_path / "out")
    assert sorted(found.prompts.values()) == ["one", "two"]
    assert (found.summary.files, found.summary.files_ignored) == (3, 10)
    names = ", ".join(f"x{i}.txt" for i in range(8))
    assert capsys.readouterr().err == f"ingest: ignored files of another format: {names} and 2 more\n"
    with pytest.raises(UserError, match=r"source: no files of format mmlu-pro found: looked for .zip, .json"):
        ingest("mmlu-pro", source, tmp_path / "out2")


# --- the output --------------------------------------------------------------------------------------------------


def test_an_output_is_replaced_only_on_request(tmp_path: Path) -> None:
    source, out = write(tmp_path / "t.csv", HEADER + "one,m,1,5\nbad,m,9,5\n"), tmp_path / "out"
    ingest("toolkit", source, out)
    (out / "pool.toml").write_text("mine")
    with pytest.raises(
        UserError, match=r"out: already holds corpus, outcomes, quarantine, summary.json: choose another"
    ):
        ingest("toolkit", source, out)
    write(source, HEADER + "two,m,0,5\n")
    found = ingest("toolkit", source, out, overwrite=True)
    assert (list(found.prompts.values()), found.quarantine) == (["two"], [])
    (out / "corpus" / "mine.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"out/corpus: holds mine.jsonl, which `ingest` did not write"):
        ingest("toolkit", source, out, overwrite=True)
    assert (out / "pool.toml").exists()
    with pytest.raises(UserError, match=r"t.csv: is a file: an output is a folder"):
        ingest("toolkit", source, source)


@pytest.mark.parametrize("part_rows", [1, 1 << 15])
def test_tables_are_replaced_once_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    """An error in the midst deletes what was written, and what was there only if that had begun."""
    source, out = write(tmp_path / "t.csv", HEADER + "one,m,1,5\n"), tmp_path / "out"
    ingest("toolkit", source, out)
    before = {file: file.read_bytes() for file in out.rglob("*.*")}
    monkeypatch.setattr(parts, "_PART_ROWS", part_rows)
    write(source, HEADER + 'two,m,1,5\nthree,m,1,5\n"open,m,1,5\n')
    with pytest.raises(UserError, match=r"t\.csv: near byte"):
        ingest("toolkit", source, out, overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == (before if part_rows > 1 else {})


def test_parts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_ROWS", 2)
    rows = "".join(f"p{i},m,{i},5\np{i},n,1,5\n" for i in range(6))
    found = ingest("toolkit", write(tmp_path / "t.csv", HEADER + rows), tmp_path / "out")
    assert storage.list_names(str(tmp_path / "out" / "corpus")) == [f"part-00000{i}.parquet" for i in range(3)]
    assert storage.list_names(str(tmp_path / "out" / "outcomes")) == [f"part-00000{i}.parquet" for i in range(4)]
    assert (len(found.prompts), len(found.outcomes), len(found.quarantine)) == (6, 8, 4)


def test_on_any_storage(root: str, tmp_path: Path) -> None:
    path = f"{root}/source/deep/t.csv"
    storage.write_bytes(path, (HEADER + "one,m,1,5\nbad,m,9,5\n").encode())
    found = ingest("toolkit", f"{root}/source", f"{root}/out")
    assert (list(found.prompts.values()), len(found.quarantine)) == (["one"], 1)
    with pytest.raises(UserError, match="nothing: no such source"):
        ingest("toolkit", f"{root}/nothing", f"{root}/out2")
    storage.write_bytes(path, b"")
    written = storage.find_files(f"{root}/out")
    with pytest.raises(UserError, match="is empty"):
        ingest("toolkit", path, f"{root}/out", overwrite=True)
    assert storage.find_files(f"{root}/out") == written


def test_an_unknown_format_names_all_and_the_nearest() -> None:
    known = ", ".join(FORMATS)
    given = {"source": "s", "out": "o"}
    with pytest.raises(UserError) as error:
        validate(IngestConfig, {"format": "Toolkits", **given}, "ingest")
    assert str(error.value) == f"ingest: format = 'Toolkits', must be one of {known}, did you mean \"toolkit\"?"
    with pytest.raises(UserError) as error:
        validate(IngestConfig, {"format": "?", **given}, "ingest")
    assert str(error.value) == f"ingest: format = '?', must be one of {known}"


PEAK = """
import re, sys
from pathlib import Path
from prefill_jobs.ingest_job import ingest
from prefill_jobs.options import (IngestConfig)

def peak_after(source):
    summary = ingest(IngestConfig(format="toolkit", source=source, out=sys.argv[3], overwrite=True))
    return summary.outcomes, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small, large = peak_after(sys.argv[1]), peak_after(sys.argv[2])
print(large[0], large[1] - small[1])
"""


def _write_rows(path: Path, num_rows: int) -> str:
    with path.open("w") as file:
        file.write(HEADER)
        for i in range(num_rows):
            file.write(f"{'a question as long as many are ' * 16}{i // 10},m{i % 10},{i % 2},5\n")
    return str(path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Reading 100 MB takes at most one part and 200 bytes for each of 20,000 prompts: 46 MB."""
    sources = _write_rows(tmp_path / "small.csv", 20_000), _write_rows(tmp_path / "large.csv", 200_000)
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", PEAK, *sources, str(tmp_path / "out")]
    outcomes, growth_kib = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert int(outcomes) == 200_000
    assert int(growth_kib) < 64 << 10, growth_kib
