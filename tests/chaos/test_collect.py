"""`collect` with all of its processes killed: every outcome is right, and no answer is paid for twice."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chaos.job import CollectJob
from collected import answered, asked_twice, billed_usd, is_right, outcomes, write_pool_of, write_prompts
from prefill_jobs.collect.collect_job import collect
from prefill_jobs.options import CollectConfig
from upstream import Fault, Upstream


@pytest.mark.parametrize(
    ("kills", "num_prompts"), [(1, 60), pytest.param(2, 90, marks=pytest.mark.slow("two Rays are killed"))]
)
def test_no_answer_is_paid_for_twice_though_the_job_is_killed(
    in_process: None, tmp_path: Path, kills: int, num_prompts: int
) -> None:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}
        for upstream in upstreams.values():
            upstream.retry_after_s, upstream.first_byte_s = 0, 0.1
            upstream.faults(Fault.RATE_LIMIT, Fault.ERROR, Fault.CUT, Fault.HANG, rate=0.15)
        concurrency = 4
        pool = write_pool_of(
            tmp_path / "pool.toml", upstreams, concurrency=concurrency, requests_per_minute=1200.0, timeout_s=5.0
        )
        corpus, budget = write_prompts(tmp_path / "corpus.jsonl", num_prompts), 0.2
        options: dict[str, Any] = {
            "corpus": str(corpus),
            "pool": pool,
            "out": str(tmp_path / "out"),
            "grader": "exact",
            "max_output_tokens": 50,
            "shard_rows": 30,
            "budget_usd": budget,
        }
        for kill in range(kills):
            enough = len(answered(upstreams["small"])) + 20
            job = CollectJob(tmp_path / f"{kill}.log", **options)
            job.kill_all_after(lambda enough=enough: len(answered(upstreams["small"])) >= enough)  # type: ignore[misc]
        manifest = collect(CollectConfig(**options, attempts=12))
        assert (manifest.outcomes, manifest.missing) == (2 * num_prompts, 0)
        found = outcomes(tmp_path / "out")
        assert all((row["correct"] == 1.0) == is_right(row["prompt_id"], row["target"]) for row in found)
        # Only calls in flight at a kill are repeated, since their result is unknown.
        for upstream in upstreams.values():
            assert len(asked_twice(upstream)) <= kills * concurrency
        spent = sum(spending.cost_usd + spending.lost_usd for spending in manifest.spending.values())
        assert billed_usd(pool, upstreams) <= spent <= budget
