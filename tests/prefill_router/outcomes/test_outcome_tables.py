"""Outcomes in every format of a corpus, with ids or with the prompts themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import write, write_jsonl
from prefill_router.common.errors import UserError
from prefill_router.corpus.reader import content_digest, content_hash
from prefill_router.corpus.split import prompt_hashes
from prefill_router.outcomes import check_columns, is_feedback, load_outcomes, target_names

NAN = float("nan")
ROWS = [
    {"prompt_id": "p", "target": "big", "correct": True, "output_tokens": 10, "cost_usd": 0.5},
    {"prompt_id": "p", "target": "small", "correct": 0.25},
    {"prompt_id": "q", "target": "small", "correct": None},
]
CSV = "prompt_id,target,correct,output_tokens,cost_usd\np,big,true,10,0.5\np,small,0.25,,\nq,small,,,\n"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_of_text_are_those_of_parquet(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"outcomes.{form}"
    uri = str(write(path, CSV) if form == "csv" else write_jsonl(path, *ROWS))
    check_columns(uri)
    assert target_names(uri) == ["big", "small"]
    assert not is_feedback(uri)
    correct, lengths, costs = load_outcomes(uri, ["big", "small"]).align(["p", "q"])
    np.testing.assert_array_equal(correct, [[1.0, 0.25], [NAN, NAN]])
    np.testing.assert_array_equal(lengths, [[10.0, NAN], [NAN, NAN]])
    np.testing.assert_array_equal(costs, [[0.5, NAN], [NAN, NAN]])


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_prompt_stands_for_its_id(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"outcomes.{form}"
    if form == "csv":
        write(path, "prompt,target,correct\n2 + 2?,big,1\n")
    else:
        pq.write_table(pa.table({"prompt": ["2 + 2?"], "target": ["big"], "correct": [1.0]}), path)
    check_columns(str(path))
    assert load_outcomes(str(path), ["big"]).keys.tolist() == prompt_hashes([content_hash("2 + 2?")]).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt_id,target\np,big\n", "column correct is missing; it has prompt_id, target"),
        ("prompt_id,target,correct\np,big,7\n", r'row 1: target "big": correct = "7", must be in \[0, 1\]'),
        ("prompt,target,correct\n,big,1\n", "row 1: prompt = null, must be a non-empty string"),
        ("prompt_id,target,correct\np,big\n", "row 1: "),
    ],
)
def test_invalid_rows_of_text_name_their_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_outcomes(str(write(tmp_path / "outcomes.csv", text)), ["big"])


def test_outcomes_by_prompt_get_the_ids_of_a_corpus(tmp_path: Path) -> None:
    uri = str(write(tmp_path / "o.csv", "prompt,target,correct\none,big,1\ntwo,big,0\nelsewhere,big,1\n"))
    ids, prompts = ["a", "b", "again", "ungraded"], ["one", "two", "one", "three"]
    contents = np.array([int.from_bytes(content_digest(prompt)[:8], "little") for prompt in prompts], np.uint64)
    outcomes = load_outcomes(uri, ["big"]).by_content(prompt_hashes(ids), contents)
    np.testing.assert_array_equal(outcomes.align(ids).correct, [[1.0], [0.0], [1.0], [NAN]])
    assert outcomes.check_known(prompt_hashes(ids), ignore_unknown=True) == 1
    with pytest.raises(UserError, match=content_hash("elsewhere")):
        outcomes.check_known(prompt_hashes(ids), ignore_unknown=False)


def test_outcomes_by_id_stay_as_they_are(tmp_path: Path) -> None:
    outcomes = load_outcomes(str(write(tmp_path / "o.csv", CSV)), ["big", "small"])
    same = outcomes.by_content(prompt_hashes(["x"]), np.array([7], np.uint64))
    np.testing.assert_array_equal(same.keys, outcomes.keys)
    np.testing.assert_array_equal(same.correct, outcomes.correct)
