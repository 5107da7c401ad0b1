"""Invalid rows: `ingest` quarantines them with a reason, and loses nothing else."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpora import write, write_jsonl
from ingested import FIXTURES, Ingested, ingest
from prefill_router.corpus.reader import content_hash

HEADER = "question,model,isCorrect,output_tokens\n"


def toolkit(path: Path, text: str | bytes) -> Ingested:
    """Ingests rows of a toolkit CSV, and one valid row after them."""
    rows = text.encode() if isinstance(text, str) else text
    write(path / "t.csv", HEADER.encode() + rows + b"good,m,1,5\n")
    return ingest("toolkit", path / "t.csv", path / "out")


IN_RANGE = "must be in [0, 1], true, false, yes or no"
COUNT = "must be a whole number, 0 or more"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("hi,m,1.5,5", f'target "m": correct = "1.5", {IN_RANGE}'),
        ("hi,m,-0.1,5", f'target "m": correct = "-0.1", {IN_RANGE}'),
        ("hi,m,inf,5", f'target "m": correct = "inf", {IN_RANGE}'),
        ("hi,m,maybe,5", f'target "m": correct = "maybe", {IN_RANGE}'),
        ("hi,m,1,many", f'target "m": output_tokens = "many", {COUNT}'),
        ("hi,m,1,-3", f'target "m": output_tokens = "-3", {COUNT}'),
        ("hi,m,1,1.5", f'target "m": output_tokens = "1.5", {COUNT}'),
        ("hi,m,1,2147483648", f'target "m": output_tokens = "2147483648", {COUNT}'),
        ("hi,m,1," + "9" * 5000, f'target "m": output_tokens = "{"9" * 56}..., {COUNT}'),
        ("hi,,1,5", 'target = "", must be a non-empty string'),
        ("hi,  ,1,5", 'target = "  ", must name a model'),
        (",m,1,5", 'prompt = "", must be a non-empty string'),
        ('" \t",m,1,5', 'prompt = " \\t", must hold more than white space'),
        ("hi,m,1", "has 3 values, but the header names 4: quote a prompt that holds a comma"),
        ("a, b,m,1,5", "has 5 values, but the header names 4: quote a prompt that holds a comma"),
        (b"caf\xe9,m,1,5", 'prompt = "caf\\udce9", contains a lone surrogate or bytes that are not UTF-8'),
        (b"hi,m\xff,1,5", 'target = "m\\udcff", contains a lone surrogate or bytes that are not UTF-8'),
    ],
)
def test_a_bad_row_goes_to_the_quarantine(tmp_path: Path, row: str | bytes, reason: str) -> None:
    found = toolkit(tmp_path, (row.encode() if isinstance(row, str) else row) + b"\n")
    prompt_id = content_hash("hi") if reason.startswith("target") else None
    assert found.quarantine == [("t.csv", 0, prompt_id, reason)]
    assert found.outcomes == {(content_hash("good"), "m"): (1.0, 5)}
    assert list(found.prompts.values()) == ["good"]  # the corpus leaves out a prompt without a valid answer
    assert (found.summary.records, found.summary.quarantined) == (2, 1)


@pytest.mark.parametrize(
    ("value", "correct"),
    [("TRUE", 1.0), ("False", 0.0), (" true ", 1.0), ("1", 1.0), ("0.0", 0.0), ("0.25", 0.25), ("1e-1", 0.1)],
)
def test_a_grade_however_it_is_written(tmp_path: Path, value: str, correct: float) -> None:
    found = toolkit(tmp_path, f"hi,m,{value},7.0\n")
    assert found.outcomes[content_hash("hi"), "m"] == (pytest.approx(correct), 7)


def test_an_answer_without_a_grade_is_a_missing_outcome(tmp_path: Path) -> None:
    found = toolkit(tmp_path, "hi,m,,7\n")
    assert found.prompts.keys() == {content_hash("hi"), content_hash("good")}
    assert found.outcomes.keys() == {(content_hash("good"), "m")}
    assert (found.summary.ungraded, found.summary.quarantined) == (1, 0)


def test_a_pair_that_stands_twice(tmp_path: Path) -> None:
    found = toolkit(tmp_path, "hi,m,1,5\nhi,n,0,5\nhi,m,0,6\nhi,m,1,5\n")
    assert found.outcomes[content_hash("hi"), "m"] == (1.0, 5)
    reason = 'target "m" already has a grade for this prompt'
    assert found.quarantine == [("t.csv", row, content_hash("hi"), reason) for row in (2, 3)]
    assert (found.summary.repeated_pairs, found.summary.prompts, found.summary.outcomes) == (2, 2, 3)
    assert found.summary.targets["m"].accuracy == 1.0


def test_an_id_with_another_prompt(tmp_path: Path) -> None:
    lines = ["sample_id,prompt,m,m|total_cost", "a,one,1,0", "a,two,0,0", "b,one,0,0"]
    found = ingest("routerbench", write(tmp_path / "r.csv", "\n".join(lines)), tmp_path / "out")
    assert found.prompts == {"a": "one", "b": "one"}
    assert found.quarantine == [("r.csv", 1, "a", 'prompt_id "a" already belongs to another prompt')]


def test_a_bad_answer_leaves_the_others_of_its_row(tmp_path: Path) -> None:
    lines = ["sample_id,prompt,m,n,m|total_cost,n|total_cost", "a,one,1,7,0,0", "b,two,x,y,0,0"]
    found = ingest("routerbench", write(tmp_path / "r.csv", "\n".join(lines)), tmp_path / "out")
    assert found.outcomes == {("a", "m"): (1.0, None)}
    assert [(row[1], row[3][:19]) for row in found.quarantine] == [
        (0, 'target "n": correct'),
        (1, 'target "m": correct'),
        (1, 'target "n": correct'),
    ]


def test_a_prompt_that_is_too_large(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HEADER + f"{'x' * 101},m,1,5\n{'é' * 50},m,1,5\n")
    found = ingest("toolkit", path, tmp_path / "out", max_prompt_bytes=100)
    assert list(found.prompts.values()) == ["é" * 50]
    assert found.quarantine[0][3].endswith("has 101 bytes, must have at most 100")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"query": "cut o', "not JSON: Unterminated string starting at: line 1 column 11 (char 10)"),
        ("[1, 2]", "must be a JSON object"),
        ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        ('{"query": "q", "model_name": "m", "performance": NaN}', f'target "m": correct = NaN, {IN_RANGE}'),
        ('{"query": "q", "model_name": "m", "performance": -Infinity}', f'target "m": correct = -Infinity, {IN_RANGE}'),
        ('{"query": "q", "model_name": "m", "performance": [1]}', f'target "m": correct = [1], {IN_RANGE}'),
        ('{"query": "q", "model_name": null, "performance": 1}', "target = null, must be a non-empty string"),
        ('{"query": {"a": 1}, "model_name": "m", "performance": 1}', 'prompt = {"a": 1}, must be a non-empty string'),
        ('{"query": "\\ud800", "model_name": "m", "performance": 1}', 'prompt = "\\ud800", contains a lone surrogate'),
        ('{"query": "q", "choices": "A or B", "model_name": "m"}', 'choices = "A or B", must be JSON: text and labels'),
    ],
)
def test_a_bad_line_goes_to_the_quarantine(tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps({"query": "nul \0 byte", "model_name": "m", "performance": True, "output_tokens": None})
    path = write(tmp_path / "l.jsonl", f"\ufeff{line}\r\n\r\n{good}\r\n")
    found = ingest("llmrouter", path, tmp_path / "out")
    assert list(found.prompts.values()) == ["nul \0 byte"]
    assert len(found.quarantine) == 1
    assert found.quarantine[0][1] == 0
    assert found.quarantine[0][3].startswith(reason)


@pytest.mark.parametrize(
    ("arms", "reason"),
    [
        ({}, "arms = {}, must be an object with an object for each model"),
        ({"m": 1}, 'arms = {"m": 1}, must be an object with an object for each model'),
        ({"m": {"reward": 1.5, "cost": 0}}, f'target "m": correct = 1.5, {IN_RANGE}'),
        ({"m": {"reward": 1, "cost": -1}}, 'target "m": cost_usd = -1, must be a finite number, 0 or more'),
        ({"m": {"reward": 1, "cost": True}}, 'target "m": cost_usd = true, must be a finite number, 0 or more'),
        ({"m": {"reward": 1, "cost": float("inf")}}, 'target "m": cost_usd = Infinity, must be a finite number'),
        ({"m": {"reward": 1, "cost": "free"}}, 'target "m": cost_usd = "free", must be a finite number, 0 or more'),
    ],
)
def test_a_bad_reward_or_cost(tmp_path: Path, arms: object, reason: str) -> None:
    good = {"prompt": "hi", "source": "mbpp", "arms": {"m": {"reward": 1, "cost": None}}}
    path = write_jsonl(tmp_path / "p.jsonl", {**good, "arms": arms}, good)
    found = ingest("paretobandit", path, tmp_path / "out")
    assert len(found.quarantine) == 1
    assert found.quarantine[0][1] == 0
    assert found.quarantine[0][3].startswith(reason)
    assert (found.outcomes, found.costs) == ({(content_hash("hi"), "m"): (1.0, None)}, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": "AB"}, 'options = "AB", must be a list of 1 to 26 strings'),
        ({"options": ["x"] * 27}, "options = ["),
        ({"question": " "}, 'question = " ", must be a non-empty string'),
        ({"answer": None}, "cannot be graded: pred or answer is missing"),
    ],
)
def test_a_question_that_cannot_be_asked(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    questions = json.loads((FIXTURES / "mmlu_pro.json").read_text())
    path = write(tmp_path / "a.json", json.dumps([7, {**questions[0], **change}, questions[1]]))
    found = ingest("mmlu-pro", path, tmp_path / "out", target="m")
    assert found.quarantine[0][1:] == (0, None, "must be a JSON object with question and options, not 7")
    assert found.quarantine[1][1:3] == (1, "mmlu-pro-70")
    assert found.quarantine[1][3].startswith(reason)
    assert found.outcomes == {("mmlu-pro-71", "m"): (0.0, None)}


def test_unknown_columns_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"query": "q", "performance": 1}
    rows = [{**good, "model_name": f"m{i}", "mood": 1, f"n{i}": 0} for i in range(200)]
    found = ingest("llmrouter", write_jsonl(tmp_path / "l.jsonl", *rows), tmp_path / "out")
    assert list(found.summary.ignored)[:2] == ['column "mood"', 'column "n0"']
    assert list(found.summary.ignored)[-1] == "further columns"
    assert len(found.summary.ignored) == 64
    assert capsys.readouterr().err.count('column "mood"') == 1


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(prompts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, unique=True))
def test_any_prompts_come_back(tmp_path: Path, prompts: list[str]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["question", "model", "isCorrect", "output_tokens"])
    writer.writerows([prompt, "m", i % 2, i] for i, prompt in enumerate(prompts))
    write(tmp_path / "t.csv", stream.getvalue())
    found = ingest("toolkit", tmp_path / "t.csv", tmp_path / "out", overwrite=True)
    assert list(found.prompts.values()) == prompts
    assert list(found.outcomes.values()) == [(float(i % 2), i) for i in range(len(prompts))]
