"""The whole road on the tiny model, through the command line, as its user would walk it."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb

from command import Command


def test_from_a_file_of_prompts_to_decisions(
    local_ray: None, command: Command, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    graded = {"activations": tmp_path / "acts", "outcomes": small_data / "outcomes.parquet"}
    pool = {"pool": f"{small_data}/pool.toml#pool"}

    extract = command("extract", corpus=small_data / "corpus.parquet", encoder=tiny_model, out=tmp_path / "acts")
    assert extract.status == 0
    assert "240 prompts" in extract.out
    assert "10 columns" in extract.out
    assert "240/240 prompts" in extract.err

    probe = command("probe", **graded, **pool, out=tmp_path / "probe")
    assert probe.status == 0
    assert probe.out.startswith("big: ")

    train = command("train", **graded, **pool, out=tmp_path / "router", seeds=4, keep=2, max_epochs=60)
    assert train.status == 0

    evaluate = command(
        "evaluate", **graded, router=tmp_path / "router", probe=tmp_path / "probe", out=tmp_path / "report"
    )
    assert evaluate.status == 0
    assert "P-AUCCC" in evaluate.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    # Which prompts "small" answers can be told, so that routing adds to the single targets.
    assert report["router"]["auc"][1] > 0.8
    assert report["router"]["mdp_auccc"] > 0.02
    assert report["router"]["saving_at_best_single"] > 0.0

    label = command("label", router=tmp_path / "router", log=small_data / "corpus.parquet", out=tmp_path / "labels")
    assert label.status == 0
    ((rows, versions),) = duckdb.sql(
        f"select count(*), count(distinct router_version) from '{tmp_path}/labels/decisions/*.parquet'"
    ).fetchall()
    assert (rows, versions) == (240, 1)


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
    assert "no finished extraction lies here" in probe.err
