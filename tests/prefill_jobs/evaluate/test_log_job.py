"""`train` and `evaluate` on feedback."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from command import Command
from prefill_jobs.options import TrainConfig
from prefill_jobs.train.train_job import train
from prefill_router.common.errors import UserError
from prefill_router.common.schema import FEEDBACK
from prefill_router.corpus.split import prompt_hashes
from prefill_router.outcomes import load_outcomes
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def feedback(small_data: Path, tmp_path: Path) -> str:
    """Feedback on every prompt, three times, as from a gateway that explores half of the time."""
    dice = np.random.default_rng(0)
    graded = pq.read_table(small_data / "outcomes.parquet").to_pandas().pivot(index="prompt_id", columns="target")
    rows: list[dict[str, Any]] = []
    for prompt_id, answers in graded["correct"].iterrows():
        for turn in range(3):
            target = dice.choice(["big", "small"]) if dice.random() < 0.5 else "small"
            if np.isnan(answers[target]):
                continue
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "target": target,
                    "correct": answers[target],
                    "propensity": 0.75 if target == "small" else 0.25,
                    "request_id": f"{prompt_id}-{turn}",
                    "answered_at": datetime(2026, 11, 25, tzinfo=UTC),
                    "latency_s": {"big": 8.0, "small": 2.0}[target],
                }
            )
    (tmp_path / "outcomes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=FEEDBACK), tmp_path / "outcomes" / "1.parquet")
    return str(tmp_path / "outcomes")


def test_a_log_tells_what_policies_would_have_been_worth(
    router: str, activations: str, small_data: Path, feedback: str, command: Command, tmp_path: Path
) -> None:
    out = str(tmp_path / "report")
    told = command("evaluate", router=router, activations=activations, outcomes=feedback, out=out)
    assert told.status == 0, told.err
    assert "doubly robust" in told.out
    report = json.loads((tmp_path / "report" / "log.json").read_text())
    assert [policy["policy"] for policy in report["policies"]] == ["router", "always big", "always small"]
    page = (tmp_path / "report" / "log.html").read_text()
    assert all(f"{policy['doubly_robust'][0]:.1%}" in page for policy in report["policies"])
    assert [point["max_latency_s"] for point in report["latency_frontier"]] == [None, 2.0]
    assert report["latency_frontier"][1]["latency_s"] == 2.0
    assert "at most 2 s" in page
    seen = set(Router.load(router).training_prompts.tolist())
    rows = pq.read_table(feedback).to_pylist()
    is_new = [hashed not in seen for hashed in prompt_hashes([row["prompt_id"] for row in rows]).tolist()]
    assert report["requests"] == sum(is_new)
    assert report["explored"] == 1.0
    graded = load_outcomes(str(small_data / "outcomes.parquet"), ["big", "small"])
    truth = np.nanmean(graded.correct[[key not in seen for key in graded.keys.tolist()]], 0)
    for policy, worth in zip(report["policies"][1:], truth, strict=True):
        assert policy["support"] == 1.0
        for estimate in ("ips", "snips", "doubly_robust"):
            _, low, high = policy[estimate]
            assert low - 0.05 <= worth <= high + 0.05


def test_a_router_is_trained_on_feedback(activations: str, small_data: Path, feedback: str, tmp_path: Path) -> None:
    pool = str(small_data / "pool.toml")
    config = TrainConfig(
        activations=activations, outcomes=feedback, pool=pool, out=str(tmp_path / "router"), seeds=2, keep=1
    )
    train(config)
    assert Router.load(str(tmp_path / "router")).pool.target_names == ["big", "small"]


def test_other_outcomes_are_no_log(small_data: Path) -> None:
    from prefill_router.evaluation.off_policy import load_log
    from prefill_router.outcomes import is_feedback

    uri = str(small_data / "outcomes.parquet")
    assert not is_feedback(uri)
    with pytest.raises(UserError, match="not a gateway's feedback"):
        load_log(uri, ["big", "small"])
