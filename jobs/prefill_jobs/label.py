"""`label`: a query log in, a decision for every prompt out."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from prefill_jobs import cluster
from prefill_jobs.progress import Progress
from prefill_router import artifact, shards, storage
from prefill_router.baselines.router import BaselineRouter
from prefill_router.config import LabelConfig
from prefill_router.decision import Policy
from prefill_router.plan import Shard, plan, read_shard
from prefill_router.router import Router
from prefill_router.schema import decisions
from prefill_router.shards import ShardFile
from prefill_router.work import Work


def label(config: LabelConfig) -> dict[str, Any]:
    """Writes the decisions of a query log to `config.out` and returns their manifest, which is written last."""
    router = artifact.load(config.router)
    planned = plan(config.log, config.shard_rows, config.limit, keep_repeats=True)
    planned.require_all_good()
    shards.claim_output(config.out, overwrite=config.overwrite)
    cluster.connect()
    arguments = {"config": config, "threads": cluster.threads_per_worker(config.workers)}
    progress = Progress("label", planned.num_rows)
    committed: list[ShardFile] = []
    counts: dict[str, int] = {}
    num_truncated = 0
    items = [{"index": i, "shard": shard.to_json()} for i, shard in enumerate(planned.shards)]
    resources = cluster.encoder_resources(config.workers)
    for row in cluster.map_rows(items, LabelShard, fn_constructor_kwargs=arguments, **resources):
        committed.append(ShardFile.model_validate_json(row["shard"]))
        for target in row["chosen"]:
            counts[target] = counts.get(target, 0) + 1
        num_truncated += row["num_truncated"]
        progress.add(committed[-1].rows, Work(tokens=row["num_tokens"]))
    manifest = {
        "format": 1,
        "router_version": router.version,
        "rows": planned.num_rows,
        "num_truncated": num_truncated,
        "decisions": dict(sorted(counts.items())),
        "shards": [s.model_dump() for s in sorted(committed, key=lambda s: s.name)],
    }
    storage.write_json(storage.join(config.out, shards.MANIFEST), manifest)
    return manifest


class LabelShard:
    """Routes one shard of a log and writes its decisions. Router and encoder are loaded at the first shard and kept."""

    def __init__(self, config: LabelConfig, threads: int) -> None:
        self.config = config
        torch.set_num_threads(threads)

    @cached_property
    def router(self) -> Router | BaselineRouter:
        return artifact.load(self.config.router)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rows = read_shard(Shard.from_json(item["shard"]))
        tokens = self.router.encoder.tokenize([row.prompt for row in rows])
        policy = Policy(self.config.tolerance, None, self.config.max_cost, self.config.min_p)
        decided = self.router.decide(tokens, [policy] * len(rows))
        records = [{"prompt_id": row.prompt_id, **asdict(d)} for row, d in zip(rows, decided, strict=True)]
        table = pa.Table.from_pylist(records, schema=decisions(self.router.pool.target_names))
        written = shards.write_shard(self.config.out, item["index"], table)
        return {
            "shard": written.model_dump_json(),
            "chosen": [d.target or "none" for d in decided],
            "num_tokens": int(tokens.num_tokens.sum()),
            "num_truncated": tokens.num_truncated,
        }
