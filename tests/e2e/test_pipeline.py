"""The pipeline: what is up to date is not run, new prompts cost what is new, and a bad router is kept back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from command import Command
from prefill_jobs.options import PipelineConfig, load_command
from prefill_jobs.pipeline.pipeline_job import Pipeline
from prefill_jobs.train import train_job
from prefill_router.common.errors import UserError
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")

STEPS = ["sample", "probe", "extract", "train", "evaluate", "publish"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path, tiny_model: Path) -> Path:
    """200 of the small corpus' prompts, with their outcomes, a pool, and the file of a pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    put_data(folder, small_data, 200)
    shutil.copy(small_data / "pool.toml", folder)
    (folder / "router.toml").write_text(
        f"""
        [pipeline]
        corpus = "{folder}/corpus.parquet"
        outcomes = "{folder}/outcomes.parquet"
        pool = "{folder}/pool.toml"
        encoder = "{tiny_model}"
        out = "{folder}/work"
        publish = "{folder}/published"
        sample = 150
        [extract]
        shard_rows = 64
        [train]
        max_epochs = 20
        """
    )
    return folder


def put_data(folder: Path, small_data: Path, num_prompts: int) -> None:
    corpus = pq.read_table(small_data / "corpus.parquet").slice(0, num_prompts)
    outcomes = pq.read_table(small_data / "outcomes.parquet")
    pq.write_table(corpus, folder / "corpus.parquet")
    known = pc.is_in(outcomes["prompt_id"], corpus["prompt_id"])
    pq.write_table(outcomes.filter(known), folder / "outcomes.parquet")


def ran(err: str) -> list[str]:
    """The steps that a pipeline says it ran."""
    last = err.strip().splitlines()[-1]
    return last.removeprefix("pipeline: ran ").split(", ") if "pipeline: ran " in last else []


def test_a_plan_tells_what_it_would_cost_and_runs_nothing(folder: Path, command: Command) -> None:
    result = command("pipeline", str(folder / "router.toml"), "--plan")
    assert result.status == 0, result.err
    assert "sample: would run, 150 prompts" in result.err
    assert "extract: would run, at most 50 prompts" in result.err  # beside those of the sample
    assert "GPU-hours" in result.err
    assert not (folder / "work").exists()


def test_the_first_run_publishes_and_the_second_does_nothing(folder: Path, command: Command) -> None:
    first = command("pipeline", str(folder / "router.toml"))
    assert first.status == 0, first.err
    assert ran(first.err) == STEPS
    assert "sample: 150 prompts, 150 of them computed" in first.err
    assert "extract: 200 prompts, 50 of them computed" in first.err
    router = Router.load(str(folder / "published"))
    layers = {column.layer for column in router.columns}
    activations = json.loads((folder / "work" / "activations" / "manifest.json").read_text())
    assert layers <= {int(name[-3:]) for name in activations["columns"]}
    second = command("pipeline", str(folder / "router.toml"))
    assert second.status == 0, second.err
    assert "pipeline: all steps are up to date" in second.err


def test_new_prompts_cost_what_is_new(folder: Path, small_data: Path, command: Command) -> None:
    put_data(folder, small_data, 240)
    plan = command("pipeline", str(folder / "router.toml"), "--plan")
    assert "sample: would run, 0 prompts" in plan.err
    assert "extract: would run, 40 prompts" in plan.err or "extract: would run, at most 40" in plan.err
    result = command("pipeline", str(folder / "router.toml"))
    assert result.status == 0, result.err
    assert ran(result.err) == ["sample", "extract", "train", "evaluate", "publish"]
    assert "probe: up to date" in result.err
    assert "extract: 240 prompts, 40 of them computed" in result.err
    assert "sample: 150 prompts, 0 of them computed" in result.err


def test_another_price_teaches_nothing_anew(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Router.load(str(folder / "published"))
    pool = folder / "pool.toml"
    pool.write_text(pool.read_text().replace("input_price = ", "input_price = 1"))
    with monkeypatch.context() as patch:
        for name in ("fit_on_ray", "fit_kernel", "probe_store"):
            patch.setattr(train_job, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
        result = command("pipeline", str(folder / "router.toml"))
    assert result.status == 0, result.err
    assert ran(result.err) == ["train", "evaluate", "publish"]
    repriced = Router.load(str(folder / "published"))
    assert repriced.pool.prices != before.pool.prices
    # It is what training anew would have made of the new prices.
    file = str(folder / "router.toml")
    settings = Pipeline(PipelineConfig(**load_command(file, "pipeline"), file=file)).train
    anew = train_job.train(settings.model_copy(update={"out": str(tmp_path / "anew")}))
    assert repriced.default_tolerance == anew.default_tolerance
    assert repriced.training["validation"] == anew.training["validation"]
    assert repriced.training["validation"]["cost"] != before.training["validation"]["cost"]
    for kept, fitted in zip(repriced.trunk.weights, anew.trunk.weights, strict=True):
        np.testing.assert_array_equal(kept.numpy(), fitted.numpy())
    assert repriced.kernel_weight == anew.kernel_weight


def test_a_target_more_is_probed(folder: Path, command: Command) -> None:
    pool, outcomes = folder / "pool.toml", folder / "outcomes.parquet"
    table = pq.read_table(outcomes)
    third = table.filter(pc.equal(table["target"], "small"))
    pq.write_table(pa.concat_tables([table, third.set_column(1, "target", pa.array(["third"] * len(third)))]), outcomes)
    assert "probe: up to date" in command("pipeline", str(folder / "router.toml"), "--plan").err
    pool.write_text((kept := pool.read_text()) + '[[pool]]\nname = "third"\ninput_price = 1.0\noutput_price = 1.0\n')
    plan = command("pipeline", str(folder / "router.toml"), "--plan")
    pool.write_text(kept)
    pq.write_table(table, outcomes)
    assert plan.status == 0, plan.err
    assert "probe: would run" in plan.err


def test_poisoned_outcomes_train_a_router_that_the_gate_keeps_back(folder: Path, command: Command) -> None:
    before = (folder / "published" / "router.json").read_bytes()
    outcomes = pq.read_table(folder / "outcomes.parquet")
    wrong = pa.array(1.0 - outcomes["correct"].to_numpy(), pa.float32())
    pq.write_table(outcomes.set_column(2, "correct", wrong), folder / "outcomes.parquet")
    result = command("pipeline", str(folder / "router.toml"))
    assert result.status == 1
    assert "gate: the new router is worse than the published one" in result.err
    assert "outcomes kept with the published router differ from the given" in result.err
    assert (folder / "published" / "router.json").read_bytes() == before
    again = command("pipeline", str(folder / "router.toml"))  # and goes on keeping it back
    assert again.status == 1
    accepted = command("pipeline", str(folder / "router.toml"), "--accept")
    assert accepted.status == 0, accepted.err
    assert (folder / "published" / "router.json").read_bytes() != before


def test_a_table_that_no_step_knows_is_an_error(tmp_path: Path, command: Command) -> None:
    (tmp_path / "router.toml").write_text('[pipeline]\ncorpus = "c"\n[extrakt]\nlayers = "1"\n')
    result = command("pipeline", str(tmp_path / "router.toml"))
    assert result.status == 1
    assert 'unknown table "extrakt", did you mean "extract"?' in result.err


def test_keys_that_a_pipeline_does_not_go_by_are_told(
    small_data: Path, tiny_model: Path, tmp_path: Path, command: Command
) -> None:
    given = {"corpus": "corpus.parquet", "outcomes": "outcomes.parquet", "pool": "pool.toml"}
    lines = [f'{key} = "{small_data / name}"' for key, name in given.items()] + [f'encoder = "{tiny_model}"']
    lines += [f'{key} = "{tmp_path / key}"' for key in ("out", "publish")]
    tables = ["[pipeline]", *lines, "[train]", 'out = "elsewhere"', "seeds = 4", "[extract]", 'layers = "1"']
    file = tmp_path / "router.toml"
    file.write_text("\n".join([*tables, 'encoder = "other"']))
    result = command("pipeline", str(file), "--plan")
    assert result.status == 1
    assert f'{file}: [extract] encoder = "other" contradicts [pipeline] encoder = ' in result.err
    file.write_text("\n".join(tables))
    result = command("pipeline", str(file), "--plan")
    assert result.status == 0, result.err
    assert f"pipeline: {file}: ignored [extract] layers, [train] out: the pipeline sets these options" in result.err


def test_the_threshold_of_rewards_is_that_of_every_step(tmp_path: Path) -> None:
    given = {name: str(tmp_path / name) for name in ("corpus", "outcomes", "pool", "out", "publish")}
    thresholded = Pipeline(PipelineConfig(**given, correct_at=0.8))
    assert (thresholded.probe.correct_at, thresholded.train.correct_at) == (0.8, 0.8)
    assert thresholded.evaluate.correct_at is None  # the router's own
    file = tmp_path / "router.toml"
    file.write_text("[train]\ncorrect_at = 0.5\n")
    assert Pipeline(PipelineConfig(**given, file=str(file))).train.correct_at == 0.5
    with pytest.raises(UserError, match=r'\[train\] correct_at = "0.5" contradicts \[pipeline\] correct_at = "0.8"'):
        Pipeline(PipelineConfig(**given, file=str(file), correct_at=0.8))


def test_intervals_decide_at_the_gate() -> None:
    from prefill_jobs.pipeline.publish_gate import _FIGURES
    from prefill_router.metrics import Interval

    by_name = {figure.name: figure for figure in _FIGURES}
    assert by_name["mean_auc"].is_worse(Interval(-0.05, -0.08, -0.02))
    assert not by_name["mean_auc"].is_worse(Interval(-0.05, -0.11, 0.01))  # it may be as good
    assert not by_name["mean_auc"].is_worse(Interval(-0.001, -0.0015, -0.0005))  # next to nothing
    assert by_name["mean_brier"].is_worse(Interval(0.02, 0.01, 0.03))
    assert not by_name["mean_brier"].is_worse(Interval(-0.02, -0.03, -0.01))
    assert not by_name["mdp_auccc"].is_worse(Interval(*[np.nan] * 3))
