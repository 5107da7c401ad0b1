"""Judged rewards, and `--correct-at`, which makes right and wrong of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_jobs.evaluate.compare_job import compare
from prefill_jobs.evaluate.evaluate_job import evaluate
from prefill_jobs.options import CompareConfig, EvaluateConfig, ProbeConfig, TrainConfig
from prefill_jobs.train.probe_job import run_probe
from prefill_jobs.train.train_job import train
from prefill_router.common.errors import UserError
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def judged(small_data: Path, tmp_path: Path) -> str:
    """The small outcomes as rewards: from 0.8 to 1 for right answers, and lower for wrong ones."""
    table = pq.read_table(small_data / "outcomes.parquet")
    rewards = np.where(table["correct"].to_numpy() == 1.0, 0.8, 0.1) + np.random.default_rng(0).random(len(table)) / 5
    index = table.column_names.index("correct")
    path = tmp_path / "judged.parquet"
    pq.write_table(table.set_column(index, "correct", pa.array(rewards.astype(np.float32))), path)
    return str(path)


@pytest.fixture
def thresholded(router: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The router, as if trained with --correct-at 0.8."""
    loaded, uri = Router.load(router), str(tmp_path_factory.mktemp("at") / "new")
    replace(loaded, training={**loaded.training, "correct_at": 0.8}).save(uri)
    return uri


def evaluation(
    router: str, activations: str, outcomes: str, out: Path, correct_at: float | None = None
) -> EvaluateConfig:
    given = {"router": router, "activations": activations, "outcomes": outcomes, "out": str(out), "draws": 20}
    return EvaluateConfig(**given, correct_at=correct_at)


def test_evaluate_counts_rewards_as_the_router_was_trained(
    router: str, thresholded: str, judged: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    binary = evaluate(evaluation(router, activations, str(small_data / "outcomes.parquet"), tmp_path / "binary"))
    for flag in (None, 0.8):
        found = evaluate(evaluation(thresholded, activations, judged, tmp_path / "found", flag))
        assert found.to_json()["standings"] == binary.to_json()["standings"]
        assert not found.is_judged
    with pytest.raises(UserError, match=r"new: trained with --correct-at 0.8, but --correct-at is 0.5: leave"):
        evaluate(evaluation(thresholded, activations, judged, tmp_path / "other", 0.5))

    rewarded = evaluate(evaluation(router, activations, judged, tmp_path / "rewards"))
    assert rewarded.is_judged
    assert rewarded.router.accuracy < binary.router.accuracy
    page = (tmp_path / "rewards" / "report.html").read_text()
    assert "The mean reward is " in page
    with pytest.raises(
        UserError, match=r"trained without --correct-at, but --correct-at is 0.8: leave it out, or train"
    ):
        evaluate(evaluation(router, activations, judged, tmp_path / "other", 0.8))


def test_compare_refuses_routers_that_were_trained_unlike(
    router: str, thresholded: str, judged: str, activations: str, tmp_path: Path
) -> None:
    given = {"activations": activations, "outcomes": judged, "out": str(tmp_path / "out"), "draws": 20}
    with pytest.raises(UserError, match=r"new: trained with --correct-at 0.8, but .* without --correct-at"):
        compare(CompareConfig(routers=(router, thresholded), **given))
    assert not compare(CompareConfig(routers=(thresholded, thresholded), **given, correct_at=0.8)).is_judged


def test_probe_and_train_learn_right_and_wrong(judged: str, activations: str, small_data: Path, tmp_path: Path) -> None:
    given = {"activations": activations, "pool": str(small_data / "pool.toml")}
    binary = str(small_data / "outcomes.parquet")
    probes, of_rewards = (
        run_probe(ProbeConfig(**given, outcomes=outcomes, out=str(tmp_path / "probe"), correct_at=correct_at))
        for outcomes, correct_at in ((binary, None), (judged, 0.8))
    )
    assert of_rewards == probes
    quick = {"seeds": 1, "max_epochs": 2, "recipe": "published"}
    expected, router = (
        train(TrainConfig(**given, **quick, outcomes=outcomes, out=str(tmp_path / name), correct_at=correct_at))
        for name, outcomes, correct_at in (("binary", binary, None), ("judged", judged, 0.8))
    )
    assert (expected.correct_at, router.correct_at) == (None, 0.8)
    prompts = ["what is one plus two", "name a river in that old town"]
    np.testing.assert_array_equal(router.predict(prompts).p_correct, expected.predict(prompts).p_correct)
    assert Router.load(str(tmp_path / "judged")).correct_at == 0.8
