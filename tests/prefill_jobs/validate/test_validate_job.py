"""`validate`: every fault of a corpus, outcomes and a pool is found in one run, with its count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from command import Command
from corpora import write, write_jsonl
from prefill_jobs.options import ValidateConfig
from prefill_jobs.validate.validate_job import validate
from prefill_router.router.artifact import Router

POOL = """
[[pool]]
name = "big"
input_price = 1.0
output_price = 2.0

[[pool]]
name = "small"

[[pool]]
name = "absent"
"""


def outcome(prompt_id: str, target: str, correct: float | None, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "target": target, "correct": correct, "output_tokens": 5, "cost_usd": None} | more


def outcomes(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def found(**given: object) -> tuple[list[str], list[str]]:
    """The facts and the errors."""
    findings = validate(ValidateConfig(**{name: str(value) for name, value in given.items()}))
    return [f.text for f in findings if not f.is_error], [f.text for f in findings if f.is_error]


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    corpus = write_jsonl(
        tmp_path / "corpus.jsonl",
        {"prompt_id": "a", "prompt": "one"},
        {"prompt_id": "b", "prompt": "two"},
        {"prompt_id": "c", "prompt": "two"},
        {"prompt_id": "d", "prompt": None},
        {"prompt_id": "e", "prompt": None},
        {"prompt_id": "a", "prompt": "another"},
    )
    graded = outcomes(
        tmp_path / "outcomes.parquet",
        outcome("a", "big", 1.0),
        outcome("a", "big", 0.0),
        outcome("b", "big", 1.5),
        outcome("z", "small", 1.0, output_tokens=-1),
        outcome("b", "other", 1.0, cost_usd=-0.1),
        outcome("c", "small", None),
    )
    facts, errors = found(corpus=corpus, outcomes=graded, pool=write(tmp_path / "pool.toml", POOL))
    assert facts == [
        f"{corpus}: 3 prompts",
        f"{corpus}: 1 prompts occur earlier, and are computed once",
        f"{corpus}: 2 rows are invalid and left out, such as row 4: prompt = null, must be a non-empty string",
        f"{corpus}: 1 rows are invalid and left out, such as row 6: "
        'prompt_id "a" occurs more than once: ids must be unique',
        f"{graded}: big: 3 answers, mean grade 83.3%",
        f"{graded}: other: 1 answers, mean grade 100.0%",
        f"{graded}: small: 1 answers, mean grade 100.0%",
        f"{graded}: not in pool pool, and ignored: other",
        "2 prompts have outcomes: 2 to train on, 0 to validate and 0 held out",
    ]
    assert errors == [
        f"{graded}: 1 values of correct are invalid: must be in [0, 1]",
        f"{graded}: 1 values of output_tokens are invalid: must be 0 or more",
        f"{graded}: 1 values of cost_usd are invalid: must be 0 or more",
        f"{graded}: 1 grades are of a pair that has one already",
        "pool pool: no outcome of absent: grade their answers, or use only targets with outcomes: big, other, small",
        'pool pool: target "small" has no prices, and 1 of its outcomes no cost_usd: give input_price and output_price '
        "in the file of --pool, or the cost of every answer",
        'pool pool: target "small" has 1 answers, all right: no activation can tell them apart: grade more prompts, '
        "or take it out of the pool",
        f"{graded}: 1 prompts are not in the corpus: add them, or pass --ignore-unknown",
        "a router needs two prompts to train on and one for each other part: grade more",
    ]


def test_the_parts_are_those_that_train_makes(small_data: Path, router: str) -> None:
    facts, _ = found(corpus=small_data / "corpus.parquet", outcomes=small_data / "outcomes.parquet")
    training = Router.load(router).training
    parts = f"{training['num_train']} to train on, {training['num_validation']} to validate and"
    assert any(parts in fact for fact in facts), facts


def test_ids_that_do_not_match_are_shown_from_both_sides(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", {"prompt_id": "q-1", "prompt": "one"})
    graded = outcomes(tmp_path / "outcomes.parquet", outcome("1", "big", 1.0), outcome("1", "small", 1.0))
    _, errors = found(corpus=corpus, outcomes=graded)
    assert errors == [
        "no outcome is of a prompt of the corpus: ids of the corpus look like q-1, those of the outcomes like 1"
    ]


def test_outcomes_may_name_prompts_by_their_content(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", {"prompt_id": "q-1", "prompt": "one"})
    graded = write(tmp_path / "outcomes.csv", "prompt,target,correct\none,big,1\n")
    facts, errors = found(corpus=corpus, outcomes=graded)
    assert facts[-1] == "1 prompts have outcomes, which name them by their content"
    assert not errors


def test_ids_that_are_hashes_are_said(tmp_path: Path) -> None:
    facts, _ = found(corpus=write_jsonl(tmp_path / "corpus.jsonl", {"prompt": "one"}))
    assert facts[1] == f"{tmp_path}/corpus.jsonl: ids are hashes of the prompts"


def test_files_that_cannot_be_read_do_not_hide_other_faults(command: Command, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt_id": ["a"]}), tmp_path / "outcomes.parquet")
    write(tmp_path / "pool.toml", "[[pool]]\nname = 1\n")
    result = command(
        "validate",
        corpus=tmp_path / "missing.jsonl",
        outcomes=tmp_path / "outcomes.parquet",
        pool=tmp_path / "pool.toml",
    )
    assert result.status == 1
    assert "error: " + f"{tmp_path}/missing.jsonl: no such corpus" in result.out
    assert "outcomes.parquet: column target is missing; it has prompt_id" in result.out
    assert "name = 1" in result.out
    assert "validate: 3 of 3 findings are errors" in result.err


def test_something_has_to_be_given(command: Command) -> None:
    result = command("validate")
    assert result.status == 1
    assert "give --corpus, --outcomes, --pool, or several of them" in result.err


def test_a_grade_that_is_no_number_is_invalid(tmp_path: Path) -> None:
    graded = outcomes(tmp_path / "outcomes.parquet", outcome("a", "big", float("nan")))
    _, errors = found(outcomes=graded)
    assert errors == [f"{graded}: 1 values of correct are invalid: must be in [0, 1]"]


def test_invalid_rows_of_outcomes_in_text_are_counted_by_reason(command: Command, tmp_path: Path) -> None:
    rows = "prompt,target,correct\none,big,yes\ntwo,big,2\ntwo,big,x\n,big,1\n"
    path = write(tmp_path / "outcomes.csv", rows)
    result = command("validate", outcomes=path)
    assert result.status == 1
    assert f"{path}: big: 1 answers, mean grade 100.0%" in result.out
    assert f'error: {path}: 2 rows are invalid, such as row 2: target "big": correct = "2", must be in' in result.out
    assert f"error: {path}: 1 rows are invalid, such as row 4: prompt = null" in result.out
