from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefill_jobs.evaluate import evaluate
from prefill_jobs.extract import extract
from prefill_jobs.label import label
from prefill_jobs.probe import run_probe
from prefill_router.baselines.router import BaselineRouter
from prefill_router.config import EvaluateConfig, ExtractConfig, LabelConfig, ProbeConfig
from prefill_router.errors import UserError
from prefill_router.router import Router


def test_only_held_out_prompts_are_scored(router: str, activations: str, small_data: Path, tmp_path: Path) -> None:
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
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["router"]["accuracy"] == evaluation.router.accuracy
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 12  # six plots, for a desk and for a phone
    assert "Only a test." in page


def test_a_store_that_training_never_saw_is_scored_whole(
    router: str, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    corpus, outcomes = (pq.read_table(small_data / f"{name}.parquet") for name in ("corpus", "outcomes"))
    for name, table in (("corpus", corpus), ("outcomes", outcomes)):
        renamed = pa.array([f"new-{i}" for i in table["prompt_id"].to_pylist()])
        pq.write_table(table.set_column(0, "prompt_id", renamed), tmp_path / f"{name}.parquet")
    store = str(tmp_path / "store")
    extract(ExtractConfig(corpus=str(tmp_path / "corpus.parquet"), encoder=str(tiny_model), out=store))
    evaluation = evaluate(
        EvaluateConfig(
            router=router, activations=store, outcomes=str(tmp_path / "outcomes.parquet"), out=str(tmp_path / "report")
        )
    )
    assert (evaluation.num_held_out, evaluation.num_seen) == (240, 0)
    assert [s.name for s in evaluation.standings] == ["router", "oracle"]


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
    assert len(embedded) == 1

    # On other embeddings that lie ready, nothing is embedded again, and all figures are the same.
    again = evaluate(config.model_copy(update={"embeddings": str(tmp_path / "report" / "embeddings")}))
    assert again.to_json()["standings"] == evaluation.to_json()["standings"]
    assert {path: path.stat().st_mtime_ns for path in embedded} == embedded

    log = str(small_data / "corpus.parquet")
    manifest = label(LabelConfig(router=str(kept), log=log, out=str(tmp_path / "decisions"), limit=50))
    assert manifest["rows"] == 50
    assert manifest["router_version"] == BaselineRouter.load(str(kept)).version
    assert set(manifest["decisions"]) <= {"big", "small"}


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
