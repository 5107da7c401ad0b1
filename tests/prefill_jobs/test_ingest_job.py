"""`prefill-router ingest`: its output and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import Command
from ingested import FIXTURES
from prefill_jobs.cli.command_line import main
from prefill_router.ingest import FORMATS

EMBEDDING = 'column "embedding_id"'


def test_what_it_prints(command: Command, tmp_path: Path) -> None:
    result = command("ingest", "toolkit", str(FIXTURES / "toolkit.csv"), out=tmp_path)
    lines = result.out.splitlines()
    assert (result.status, result.err) == (0, f"ingest: ignored: {EMBEDDING}\n")
    assert lines[:-1] == [
        f"{tmp_path}: 2 prompts, 4 outcomes of 2 targets, 0 rows quarantined",
        "gpt-oss-20b-high: 2 graded, accuracy 50.0%",
        "nemotron-3-nano-reasoning: 2 graded, accuracy 50.0%",
        f"ignored: {EMBEDDING}",
    ]
    summary = json.loads(lines[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["targets"]["gpt-oss-20b-high"] == {"graded": 2, "accuracy": 0.5}
    assert summary["ignored"] == {EMBEDDING: 1}


def test_a_second_time(command: Command, tmp_path: Path) -> None:
    arguments = ("ingest", "openai-log", str(FIXTURES / "openai.jsonl"))
    assert command(*arguments, out=tmp_path).status == 0
    again = command(*arguments, out=tmp_path)
    assert (again.status, again.out) == (1, "")
    assert again.err == (
        f"prefill-router: {tmp_path}: already holds corpus, quarantine, summary.json: "
        "choose another --out, or replace it with --overwrite\n"
    )
    assert command(*arguments, "--overwrite", out=tmp_path).status == 0


def test_by_a_configuration(command: Command, tmp_path: Path) -> None:
    source = (FIXTURES / "mmlu_pro.json").as_posix()
    (tmp_path / "router.toml").write_text(f'[ingest]\nformat = "mmlu-pro"\nsource = "{source}"\ntarget = "gpt-4o"\n')
    result = command("ingest", config=tmp_path / "router.toml", out=tmp_path / "out")
    assert result.status == 0
    assert "gpt-4o: 3 graded, accuracy 33.3%" in result.out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tolkit", "t.csv"], "ingest: format = 'tolkit', must be one of {known}, did you mean \"toolkit\"?"),
        (["toolkit", "/no/such.csv"], "/no/such.csv: no such source"),
        (["toolkit", "t.csv", "--target", "m"], "target = 'm': records of format toolkit name their targets"),
        (["toolkit", "gs://bucket/t.csv"], 'gs://bucket/t.csv: scheme "gs" is not supported: use a local path'),
    ],
)
def test_what_it_cannot_read_is_one_line(command: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = command("ingest", *arguments, out=tmp_path / "out")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"prefill-router: {message.format(known=', '.join(FORMATS))}")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_source_it_is_usage(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ingest", "toolkit", "--out", str(tmp_path)])
    assert ended.value.code == 2


def test_a_source_in_the_output_is_refused_before_it_is_deleted(command: Command, tmp_path: Path) -> None:
    (tmp_path / "answers.csv").write_text("prompt,small,big\none,1,1\ntwo,0,1\n")
    assert command("ingest", "table", str(tmp_path / "answers.csv"), out=tmp_path / "out").status == 0
    corpus = tmp_path / "out" / "corpus"
    before = {file.name: file.read_bytes() for file in corpus.iterdir()}
    again = command("ingest", "table", str(corpus), "--overwrite", out=tmp_path / "out")
    assert again.status == 1
    assert "is in the output folder" in again.err
    assert {file.name: file.read_bytes() for file in corpus.iterdir()} == before
