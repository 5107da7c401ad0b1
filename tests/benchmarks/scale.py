"""How an extraction grows with its cluster: what the driver can take, and what that leaves of many GPUs.

Measured here are the driver's own rates, with actors that compute nothing: planning the corpus, and taking in shards.
From them, and from a GPU's computed rate, follows how long 10^6 to 10^9 prompts take, and what holds them up.

    python tests/benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from prefill_jobs import cluster
from prefill_router.keys import Keys
from prefill_router.plan import plan
from tiny import random_prompts

TOKENS_PER_PROMPT = 225
GPU_TOKENS_PER_S = 0.5 * 989e12 / (0.88e9 / 2)  # README, At scale: a 0.6 B encoder to half of its depth
ROWS_A_SHARD = 4096


class Instant:
    """Hands back a record of a shard's size at once."""

    def __init__(self, num_rows: int) -> None:
        self.record = np.random.default_rng(0).bytes(32 * num_rows)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"digest": row["digest"], "done": pickle.dumps(self.record)}


def planning_rate(num_rows: int) -> float:
    """Rows a second that the driver reads, hashes and cuts into shards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        prompts = random_prompts(1000, seed=0)
        with path.open("w") as file:
            file.writelines(json.dumps({"prompt": f"{i} {prompts[i % 1000]}"}) + "\n" for i in range(num_rows))
        started = time.perf_counter()
        planned: Keys = plan(str(path), ROWS_A_SHARD).keys
        return len(planned) / (time.perf_counter() - started)


def shard_rate(num_shards: int, num_rows: int) -> float:
    """Shards a second that come back to the driver through Ray Data, of actors that take no time."""
    items = [{"digest": str(i), "task": b"x" * 200} for i in range(num_shards)]
    options = cluster.Actors(most=2).options(3)
    rows = cluster.map_rows(items, Instant, fn_constructor_kwargs={"num_rows": num_rows}, **options)
    first = next(rows)
    started, num_bytes = time.perf_counter(), len(first["done"])
    for row in rows:
        num_bytes += len(pickle.loads(row["done"]))
    return (num_shards - 1) / (time.perf_counter() - started)


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--shards", type=int, default=3_000)
    arguments = parser.parse_args()
    rows_per_s = planning_rate(arguments.rows)
    with cluster.connected():
        shards_per_s = shard_rate(arguments.shards, ROWS_A_SHARD)
    tell(f"planning: {rows_per_s:,.0f} rows/s; taking in shards of {ROWS_A_SHARD:,} rows: {shards_per_s:,.0f} a second")
    tell(f"{'prompts':>14} {'GPUs':>6} {'plan s':>9} {'GPU s':>11} {'driver s':>10} {'efficiency':>10}  held up by")
    for prompts in (10**6, 10**8, 10**9):
        for gpus in (1, 8, 64, 512, 1000):
            plan_s = prompts / rows_per_s
            gpu_s = prompts * TOKENS_PER_PROMPT / GPU_TOKENS_PER_S / gpus
            driver_s = prompts / ROWS_A_SHARD / shards_per_s
            whole_s = plan_s + max(gpu_s, driver_s)
            worst = max((plan_s, "planning"), (gpu_s, "GPUs"), (driver_s, "the driver"))[1]
            times = f"{plan_s:9,.0f} {gpu_s:11,.0f} {driver_s:10,.0f}"
            tell(f"{prompts:14,} {gpus:6,} {times} {gpu_s / whole_s:10.0%}  {worst}")


if __name__ == "__main__":
    main()
