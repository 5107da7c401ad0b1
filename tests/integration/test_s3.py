"""Extract, train and label, each a process of its own, against an S3 server on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb

from prefill_router import storage
from prefill_router.features import ActivationStore
from prefill_router.router import Router
from s3 import s3_bucket  # noqa: F401


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefill_jobs", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_jobs_read_and_write_a_bucket(
    s3_bucket: str,  # noqa: F811
    tiny_model: Path,
    small_data: Path,
    tmp_path: Path,
) -> None:
    root = f"{s3_bucket}/road"
    for path in small_data.iterdir():
        storage.write_bytes(f"{root}/{path.name}", path.read_bytes())
    run(
        *("extract", "--corpus", f"{root}/corpus.parquet", "--encoder", str(tiny_model), "--shard-rows", "100"),
        *("--layers", "1,3", "--out", f"{root}/activations"),
    )
    store = ActivationStore.open(f"{root}/activations")
    assert store.manifest.rows == 240
    assert store.num_shards == 3
    run(
        *("train", "--activations", f"{root}/activations", "--outcomes", f"{root}/outcomes.parquet"),
        *("--pool", f"{root}/pool.toml", "--seeds", "2", "--keep", "1", "--out", f"{root}/router"),
    )
    router = Router.load(f"{root}/router")
    assert router.pool.target_names == ["big", "small"]
    assert not storage.exists(f"{root}/router/_runs")
    run("label", "--router", f"{root}/router", "--log", f"{root}/corpus.parquet", "--out", f"{root}/decisions")
    (tmp_path / "decisions.parquet").write_bytes(storage.read_bytes(f"{root}/decisions/part-000000.parquet"))
    rows = duckdb.sql(f"select target, count(*) from '{tmp_path}/decisions.parquet' group by target").fetchall()
    assert sum(count for _, count in rows) == 240
    assert {target for target, _ in rows} <= {"big", "small"}


def test_a_bucket_that_does_not_exist_is_one_line(s3_bucket: str, tmp_path: Path) -> None:  # noqa: F811
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prefill_jobs", "extract", "--corpus", "s3://no-such-bucket/c.jsonl"),
            *("--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "prefill-router: s3://no-such-bucket/c.jsonl: no such corpus\n"
