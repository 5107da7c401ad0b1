"""Feedback as a pipeline reads it: which calls make an outcome, and what is copied again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_jobs.options import PipelineConfig
from prefill_jobs.pipeline.gathered_feedback import GatheredFeedback, is_folder_of_feedback
from prefill_jobs.pipeline.pipeline_job import Pipeline
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.schema import FEEDBACK, OUTCOMES
from prefill_router.corpus.reader import Row, content_hash, files, read
from prefill_router.outcomes import load_outcomes

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def a_call(prompt: str, target: str, correct: float, propensity: float = 1.0, **more: Any) -> dict[str, Any]:
    made = {"request_id": "r", "answered_at": NOON, "caller": "", **more}
    given = {"target": target, "correct": correct, "propensity": propensity}
    return {"prompt_id": content_hash(prompt), **given, **made}


def write(folder: Path, name: str, prompts: list[str], *calls: dict[str, Any]) -> None:
    """Adds a file of prompts and one of calls to a gateway's folder. Calls without an id get one."""
    for kind in ("prompts", "outcomes"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    ids = pa.array([content_hash(prompt) for prompt in prompts])
    pq.write_table(pa.table({"prompt_id": ids, "prompt": prompts}), folder / "prompts" / f"{name}.parquet")
    rows = [{"call_id": f"{name}-{i}", **row} for i, row in enumerate(calls)]
    pq.write_table(pa.Table.from_pylist(rows, schema=FEEDBACK), folder / "outcomes" / f"{name}.parquet")


def gathered(tmp_path: Path, *graded: str, days: float | None = None) -> GatheredFeedback:
    feedback = GatheredFeedback([str(tmp_path / "feedback")], graded, str(tmp_path / "work"), days)
    feedback.update()
    return feedback


def rows_of(uri: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in pq.read_table(uri).to_pylist()]


def test_calls_of_a_pair_make_one_outcome_whoever_made_them(tmp_path: Path) -> None:
    calls = [
        a_call("p", "big", 1.0, 0.1, caller="ann", output_tokens=10, cost_usd=0.5),
        a_call("p", "big", 0.0, 0.2, caller="ben", output_tokens=20),
        a_call("p", "small", 1.0, 0.9),
        a_call("p", "small", 1.0),  # a named target
        a_call("q", "small", 0.5),
    ]
    write(tmp_path / "feedback", "1", ["p", "q"], *calls, {**calls[0], "correct": 0.0, "call_id": "1-0"})
    outcomes = {row[:2]: row[2:] for row in rows_of(gathered(tmp_path).outcomes)}
    assert outcomes == {
        (content_hash("p"), "big"): (0.5, 15, 0.5),
        (content_hash("p"), "small"): (1.0, None, None),
        (content_hash("q"), "small"): (0.5, None, None),
    }


def test_graded_outcomes_precede_feedback_on_the_same_pair(tmp_path: Path) -> None:
    graded = [
        {"prompt_id": content_hash("p"), "target": "big", "correct": 0.0},
        {"prompt_id": "of-mine", "target": "big", "correct": 1.0},
    ]
    pq.write_table(pa.Table.from_pylist(graded, schema=OUTCOMES), tmp_path / "graded.parquet")
    write(tmp_path / "feedback", "1", ["p"], a_call("p", "big", 1.0, 0.5), a_call("p", "small", 1.0, 0.5))
    outcomes = load_outcomes(gathered(tmp_path, str(tmp_path / "graded.parquet")).outcomes, ["big", "small"])
    answers = outcomes.align([content_hash("p"), "of-mine"])
    np.testing.assert_array_equal(answers.correct, [[0.0, 1.0], [1.0, np.nan]])


def test_prompts_are_added_and_equal_files_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "feedback", "1", ["p", "q"], a_call("p", "big", 1.0))
    feedback = gathered(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.parquet")}
    gathered(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.parquet")} == stamps
    (tmp_path / "feedback" / "prompts" / "1.parquet").unlink()  # merged with the next one
    write(tmp_path / "feedback", "2", ["q", "r", "p", "r"], a_call("r", "big", 1.0))
    feedback.update()
    found = [[row.prompt for _, _, row in read(file) if isinstance(row, Row)] for file in files(feedback.prompts)]
    assert found == [["p", "q"], ["r"]]


def test_files_that_the_gateway_merges_meanwhile_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "feedback", "1", ["p"], a_call("p", "big", 1.0))
    list_files = storage.list_files
    gone = iter([str(tmp_path / "feedback" / "outcomes" / "0.parquet")])

    def listed(uri: str, suffixes: list[str]) -> list[str]:
        return [*gone, *list_files(uri, suffixes)]

    monkeypatch.setattr(storage, "list_files", listed)
    assert len(rows_of(gathered(tmp_path).outcomes)) == 1


def test_old_feedback_is_forgotten_and_its_prompts_kept(tmp_path: Path) -> None:
    old = {"answered_at": NOON - timedelta(days=3)}
    write(tmp_path / "feedback", "1", ["p", "q"], a_call("p", "big", 0.0, **old), a_call("q", "big", 1.0))
    feedback = gathered(tmp_path, days=2)
    assert [row[0] for row in rows_of(feedback.outcomes)] == [content_hash("q")]
    assert pq.read_table(files(feedback.prompts)[0]).num_rows == 2
    assert len(rows_of(gathered(tmp_path, days=4).outcomes)) == 2


def test_feedback_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    write(tmp_path / "feedback", "1", ["p"], a_call("p", "big", 1.0))
    (tmp_path / "feedback" / "prompts" / "1.parquet").unlink()
    with pytest.raises(UserError, match="start the endpoint with --keep-prompts"):
        gathered(tmp_path)
    write(tmp_path / "feedback", "1", ["p"], a_call("p", "big", 1.0, 0.0))
    with pytest.raises(UserError, match="propensity must be above 0"):
        gathered(tmp_path)
    assert is_folder_of_feedback(str(tmp_path / "feedback"))
    assert not is_folder_of_feedback(str(tmp_path / "feedback" / "outcomes"))
    assert not is_folder_of_feedback(str(tmp_path / "nowhere"))


def test_a_pipeline_reads_graded_outcomes_and_feedback_together(tmp_path: Path) -> None:
    write(tmp_path / "feedback", "1", ["p"], a_call("p", "big", 1.0))
    given = {name: str(tmp_path / name) for name in ("pool", "out", "publish")}
    both = f"{tmp_path}/graded,{tmp_path}/feedback"
    mixed = Pipeline(PipelineConfig(**given, outcomes=both, corpus=str(tmp_path / "corpus")))
    assert mixed.train.corpus == f"{tmp_path}/corpus,{tmp_path}/out/feedback/prompts"
    assert mixed.train.outcomes == f"{tmp_path}/out/feedback/outcomes.parquet"
    alone = Pipeline(PipelineConfig(**given, outcomes=str(tmp_path / "feedback")))
    assert alone.train.corpus == f"{tmp_path}/out/feedback/prompts"
    with pytest.raises(UserError, match="or outcomes without prompts: wait for feedback, or give --corpus"):
        Pipeline(PipelineConfig(**given, outcomes=both))
    with pytest.raises(UserError, match="has a gateway's feedback yet"):
        Pipeline(PipelineConfig(**given, outcomes=f"{tmp_path}/a,{tmp_path}/b", corpus="c"))
