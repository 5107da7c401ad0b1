"""The whole road on the tiny model, through the command line and a bucket, as its user would walk it."""

from __future__ import annotations

from pathlib import Path

import duckdb

from command import Command
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.router.artifact import Router


def test_from_a_file_of_prompts_to_decisions(
    local_ray: None, command: Command, tiny_model: Path, small_data: Path, s3_bucket: str, tmp_path: Path
) -> None:
    root = f"{s3_bucket}/road"
    for path in small_data.iterdir():
        storage.write_bytes(f"{root}/{path.name}", path.read_bytes())
    graded = {"activations": f"{root}/acts", "outcomes": f"{root}/outcomes.parquet"}
    pool = {"pool": f"{root}/pool.toml#pool"}

    extract = command(
        "extract", corpus=f"{root}/corpus.parquet", encoder=tiny_model, shard_rows=100, out=f"{root}/acts"
    )
    assert extract.status == 0, extract.err
    assert "240 prompts" in extract.out
    assert "10 columns" in extract.out
    assert "240/240 prompts" in extract.err
    store = ActivationStore.open(f"{root}/acts")
    assert (store.manifest.rows, store.num_shards) == (240, 3)

    probe = command("probe", **graded, **pool, out=f"{root}/probe")
    assert probe.status == 0, probe.err
    assert probe.out.startswith("big: ")

    train = command("train", **graded, **pool, out=f"{root}/router", seeds=4, keep=2, max_epochs=60)
    assert train.status == 0, train.err
    assert Router.load(f"{root}/router").pool.target_names == ["big", "small"]
    assert not storage.exists(f"{root}/router/_runs")

    evaluate = command("evaluate", **graded, router=f"{root}/router", probe=f"{root}/probe", out=f"{root}/report")
    assert evaluate.status == 0, evaluate.err
    assert "P-AUCCC" in evaluate.out
    report = storage.read_json(f"{root}/report/report.json")
    # Which prompts "small" answers can be told, so that routing adds to the single targets.
    assert report["router"]["auc"][1] > 0.8
    assert report["router"]["mdp_auccc"] > 0.02
    assert report["router"]["saving_at_best_single"] > 0.0

    log = {"log": f"{root}/corpus.parquet", "shard_rows": 240}
    label = command("label", router=f"{root}/router", **log, out=f"{root}/labels")
    assert label.status == 0, label.err
    (decided,) = storage.find_files(f"{root}/labels/decisions")
    (tmp_path / "decisions.parquet").write_bytes(storage.read_bytes(decided))
    query = f"select count(*), count(distinct router_version) from '{tmp_path}/decisions.parquet'"
    ((rows, versions),) = duckdb.sql(query).fetchall()
    assert (rows, versions) == (240, 1)
    targets = duckdb.sql(f"select distinct target from '{tmp_path}/decisions.parquet'").fetchall()
    assert {target for (target,) in targets} <= {"big", "small"}


def test_a_failed_job_leaves_no_result(
    local_ray: None, command: Command, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    corpus = small_data / "corpus.parquet"
    failed = command("extract", corpus=corpus, encoder=tiny_model, layers="7", out=tmp_path / "acts")
    assert failed.status == 1
    assert failed.err.splitlines()[-1].startswith("prefill-router: layer 7 is out of range")
    probe = command(
        "probe",
        activations=tmp_path / "acts",
        outcomes=small_data / "outcomes.parquet",
        pool=small_data / "pool.toml",
        out=tmp_path / "probe",
    )
    assert probe.status == 1
    assert "no finished extraction here" in probe.err
