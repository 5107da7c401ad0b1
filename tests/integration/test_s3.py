"""Extract, train, label and collect against an S3 server on loopback."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import duckdb

from collected import asked_twice, billed_usd, is_right, write_pool_of, write_prompts
from command import Command
from prefill_jobs.collect import CollectManifest, collect
from prefill_router import storage
from prefill_router.config import CollectConfig
from prefill_router.features import ActivationStore
from prefill_router.router import Router
from upstream import Fault, Upstream


def test_the_jobs_read_and_write_a_bucket(
    local_ray: None, command: Command, s3_bucket: str, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    root = f"{s3_bucket}/road"
    for path in small_data.iterdir():
        storage.write_bytes(f"{root}/{path.name}", path.read_bytes())

    corpus = f"{root}/corpus.parquet"
    out = f"{root}/activations"
    extract = command("extract", corpus=corpus, encoder=tiny_model, layers="1,3", shard_rows=100, out=out)
    assert extract.status == 0, extract.err
    store = ActivationStore.open(out)
    assert store.manifest.rows == 240
    assert store.num_shards == 3

    outcomes, pool = f"{root}/outcomes.parquet", f"{root}/pool.toml"
    options = {"activations": out, "outcomes": outcomes, "pool": pool, "seeds": 2, "keep": 1}
    train = command("train", **options, out=f"{root}/router")
    assert train.status == 0, train.err
    assert Router.load(f"{root}/router").pool.target_names == ["big", "small"]
    assert not storage.exists(f"{root}/router/_runs")

    label = command("label", router=f"{root}/router", log=corpus, out=f"{root}/decisions")
    assert label.status == 0, label.err
    (decided,) = storage.find_files(f"{root}/decisions/decisions")
    (tmp_path / "decisions.parquet").write_bytes(storage.read_bytes(decided))
    rows = duckdb.sql(f"select target, count(*) from '{tmp_path}/decisions.parquet' group by target").fetchall()
    assert sum(count for _, count in rows) == 240
    assert {target for target, _ in rows} <= {"big", "small"}


def test_workers_collect_into_a_bucket_within_one_budget(local_ray: None, s3_bucket: str, tmp_path: Path) -> None:
    root, num_prompts, budget_usd = f"{s3_bucket}/collected", 48, 0.003
    corpus = write_prompts(tmp_path / "corpus.jsonl", num_prompts)
    storage.write_bytes(f"{root}/corpus.jsonl", corpus.read_bytes())
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}
        for upstream in upstreams.values():
            upstream.retry_after_s = 0
            upstream.faults(Fault.CUT, Fault.ERROR, Fault.RESET_MIDWAY, rate=0.2)
        pool = write_pool_of(tmp_path / "pool.toml", upstreams)

        def run(usd: float) -> CollectManifest:
            given = {"corpus": f"{root}/corpus.jsonl", "pool": pool, "out": f"{root}/out", "grader": "exact"}
            limits = {"max_output_tokens": 50, "attempts": 12, "budget_usd": usd}
            return collect(CollectConfig(**given, **limits, workers=3, shard_rows=6))

        first = run(budget_usd)
        spent = sum(spending.cost_usd + spending.lost_usd for spending in first.spending.values())
        assert billed_usd(pool, upstreams) <= spent <= budget_usd
        assert first.left_out > 0
        assert 0 < first.outcomes < 2 * num_prompts
        last = run(10.0)
        assert (last.outcomes, last.missing, last.left_out) == (2 * num_prompts, 0, 0)
        assert not any(asked_twice(upstream) for upstream in upstreams.values())
    files = storage.find_files(f"{root}/out/outcomes")
    rows = [row for file in files for row in storage.read_table(file).to_pylist()]
    assert len({(row["prompt_id"], row["target"]) for row in rows}) == len(rows) == 2 * num_prompts
    assert all((row["correct"] == 1.0) == is_right(row["prompt_id"], row["target"]) for row in rows)


def test_a_bucket_that_does_not_exist_is_one_line(command: Command, s3_bucket: str, tmp_path: Path) -> None:
    result = command("extract", corpus="s3://no-such-bucket/c.jsonl", out=tmp_path / "out")
    assert (result.status, result.out) == (1, "")
    assert result.err == "prefill-router: s3://no-such-bucket/c.jsonl: no such corpus\n"


def test_a_store_that_cannot_be_reached_is_one_line(command: Command, s3_bucket: str, small_data: Path) -> None:
    out = "s3://no-such-bucket/out"
    result = command("probe", activations=out, outcomes=small_data / "outcomes.parquet", pool=out, out=out)
    assert result.status == 1
    assert result.err.startswith("prefill-router: ")
    assert result.err.count("\n") == 1
