"""`label` with killed processes: every line is decided once, and no prompt is encoded twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chaos.job import LabelJob
from corpora import write_jsonl
from prefill_jobs.label.label_job import label
from prefill_jobs.options import LabelConfig
from prefill_router.activations.commit_log import CommitLog
from prefill_router.common.validation import validate
from tiny import random_prompts

TWICE = pytest.mark.slow("two Rays are killed")


def decisions(out: Path) -> list[dict[str, Any]]:
    rows = [row for file in (out / "decisions").rglob("*.parquet") for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted(rows, key=lambda row: (row["file"], row["row"]))


def num_estimated(out: Path) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in (out / "estimates").rglob("part-*.parquet"))


def num_kept(out: Path) -> int:
    return sum(CommitLog.open(str(out / "activations")).records["rows"].to_pylist())


@pytest.mark.parametrize(("num_read", "kills"), [(num_kept, 1), pytest.param(num_estimated, 2, marks=TWICE)])
def test_a_log_is_decided_once_though_the_job_is_killed(
    in_process: None, router: str, tmp_path: Path, num_read: Callable[[Path], int], kills: int
) -> None:
    prompts = random_prompts(160)
    lines = prompts + random.Random(1).choices(prompts, k=70)  # 30 % repeats
    write_jsonl(tmp_path / "log.jsonl", *({"prompt": prompt} for prompt in lines))
    options: dict[str, Any] = {
        "router": router,
        "log": str(tmp_path / "log.jsonl"),
        "shard_rows": 16,
        "budget_usd": 0.01,
    }
    label(validate(LabelConfig, {**options, "out": str(tmp_path / "calm")}, "calm"))

    out = tmp_path / "out"
    if num_read is num_kept:
        options["activations"] = str(out / "activations")
    seen = 0
    for kill in range(kills):
        job = LabelJob(tmp_path / f"{kill}.log", saboteur=True, reads=2, **options, out=out)
        job.kill_all_after(lambda seen=seen: num_read(out) > seen)  # type: ignore[misc]
        assert not (out / "manifest.json").exists()
        seen = num_read(out)
        assert 0 < seen < len(set(prompts))
    assert label(validate(LabelConfig, {**options, "out": str(out)}, "last")).computed == len(set(prompts)) - seen
    assert num_estimated(out) == len(set(prompts))
    assert decisions(out) == decisions(tmp_path / "calm")
    assert [row["row"] for row in decisions(out)] == list(range(len(lines)))
