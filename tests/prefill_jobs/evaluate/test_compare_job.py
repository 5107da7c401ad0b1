from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import Command
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def worse(activations: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A router trained for one epoch."""
    from prefill_jobs.options import TrainConfig
    from prefill_jobs.train.train_job import train

    out = str(tmp_path_factory.mktemp("worse") / "router")
    outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
    given = {"activations": activations, "outcomes": outcomes, "pool": pool, "recipe": "published"}
    train(TrainConfig(**given, out=out, seeds=1, max_epochs=1))
    return out


def test_routers_are_compared_on_prompts_new_to_both(
    router: str, worse: str, activations: str, small_data: Path, tmp_path: Path, command: Command
) -> None:
    outcomes = small_data / "outcomes.parquet"
    result = command("compare", router, worse, activations=activations, outcomes=outcomes, out=tmp_path, draws=100)
    assert result.status == 0, result.err
    seen = set(Router.load(router).training_prompts.tolist()) | set(Router.load(worse).training_prompts.tolist())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_held_out"] == 240 - len(seen)
    assert [standing["name"] for standing in report["standings"]] == [router, worse]
    value, low, high = report["standings"][1]["router_less_this"]["mean_auc"]
    assert low <= value <= high
    first, second = (standing["intervals"]["mean_auc"][0] for standing in report["standings"])
    assert value == pytest.approx(first - second)
    assert f"{router} minus {worse}:" in result.out
    assert "mean AUC: +" in result.out
    assert worse in (tmp_path / "report.html").read_text()


def test_a_router_is_no_better_than_itself(
    router: str, activations: str, small_data: Path, tmp_path: Path, command: Command
) -> None:
    outcomes = small_data / "outcomes.parquet"
    result = command("compare", router, router, activations=activations, outcomes=outcomes, out=tmp_path, draws=20)
    assert "MDP-AUCCC x 1000: +0.0 (+0.0 to +0.0)" in result.out


@pytest.mark.parametrize("routers", [(), ("one",)])
def test_one_router_is_not_enough(routers: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    result = command("compare", *routers, activations="a", outcomes="o", out=tmp_path)
    assert result.status in (1, 2)
    assert "routers" in result.err.lower()


def test_a_store_of_another_encoder_is_refused(
    router: str, worse: str, small_data: Path, tiny_model: Path, tmp_path: Path, command: Command
) -> None:
    store = tmp_path / "store"
    extracted = command(
        "extract", corpus=small_data / "corpus.parquet", encoder=tiny_model, out=store, limit=9, max_tokens=8
    )
    assert extracted.status == 0
    outcomes = small_data / "outcomes.parquet"
    result = command("compare", router, worse, activations=store, outcomes=outcomes, out=tmp_path / "out")
    assert result.status == 1
    assert "no store of its encoder" in result.err
