"""`collect` into a bucket, and missing buckets. `e2e/test_road.py` covers the other jobs on S3."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from collected import asked_twice, billed_usd, is_right, write_pool_of, write_prompts
from command import Command
from prefill_jobs.collect.collect_job import CollectManifest, collect
from prefill_jobs.options import CollectConfig
from prefill_router import storage
from upstream import Fault, Upstream


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
