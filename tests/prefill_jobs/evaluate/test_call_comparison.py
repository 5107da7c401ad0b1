"""Two routers compared on a gateway's calls: the gate's estimate."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_jobs.evaluate.call_comparison import compare_on_calls
from prefill_router.common.schema import FEEDBACK
from prefill_router.corpus.split import prompt_hashes
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


def write_calls(path: Path, small_data: Path, *, explores: bool) -> str:
    """Five calls of each graded prompt, most of them to `small`: by a gateway that explores, or as callers wanted."""
    dice, rows, share = np.random.default_rng(0), [], 0.4
    graded = pq.read_table(small_data / "outcomes.parquet").to_pandas().dropna(subset="correct")
    for prompt_id, answers in graded.groupby("prompt_id"):
        right = dict(zip(answers["target"], answers["correct"], strict=True))
        for _ in range(5):
            target = dice.choice(["big", "small"]) if dice.random() < share else "small"
            if target in right:
                call = {"target": target, "correct": right[target], "request_id": str(len(rows))}
                call["propensity"] = share / 2 + (1.0 - share) * (target == "small") if explores else 1.0
                rows.append({"prompt_id": prompt_id, **call, "answered_at": datetime(2026, 11, 25, tzinfo=UTC)})
    pq.write_table(pa.Table.from_pylist(rows, schema=FEEDBACK), path)
    return str(path)


def exchanged(router: Router) -> Router:
    """The router, but it takes each target for the other."""
    return replace(
        router,
        trunk=router.trunk.of_outputs([1, 0]),
        kernel=router.kernel.of_outputs([1, 0, 2, 3]),
        calibration=router.calibration.of_targets([1, 0]),
    )


def test_a_worse_router_is_found_out_by_what_chance_chose(
    router: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    calls, good = write_calls(tmp_path / "calls.parquet", small_data, explores=True), Router.load(router)
    same = compare_on_calls(good, good, activations, calls, 100)
    assert same is not None
    assert {name: tuple(difference) for name, difference in same.differences.items()} == dict.fromkeys(
        ("brier_of_calls", "mdp_auccc", "mean_brier"), (0.0, 0.0, 0.0)
    )
    hashes = prompt_hashes(pq.read_table(calls)["prompt_id"].to_pylist())
    assert same.num_calls == same.num_chance == int((~np.isin(hashes, good.training_prompts)).sum())
    worse = compare_on_calls(exchanged(good), good, activations, calls, 100)
    better = compare_on_calls(good, exchanged(good), activations, calls, 100)
    assert worse is not None
    assert better is not None
    assert worse.differences["mean_brier"].low > 0.0
    assert better.differences["mean_brier"].high < 0.0
    assert worse.differences["mdp_auccc"].value < 0.0 < better.differences["mdp_auccc"].value


def test_calls_of_a_gateway_that_does_not_explore_compare_nothing(
    router: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    calls, good = write_calls(tmp_path / "calls.parquet", small_data, explores=False), Router.load(router)
    assert compare_on_calls(exchanged(good), good, activations, calls, 100) is None
