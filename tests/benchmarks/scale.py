"""How an extraction grows with its cluster: what the driver can take, and what that leaves of many GPUs.

Measured here are the project's own rates: reading the corpus, of one core; putting its keys together, of the driver;
and taking in shards from actors that compute nothing, one a task and several. From them, and from a GPU's computed
rate, follows how long 10^6 to 10^9 prompts take on up to a thousand GPUs, and what holds them up: as it is, and as it
was when the driver read the corpus alone and every shard was a task.

    python tests/benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.data

sys.path.insert(0, str(Path(__file__).parents[1]))

from prefill_jobs.runtime import cluster, ray_tasks
from prefill_router.corpus.plan import plan
from prefill_router.reports.versions import versions
from tiny import random_prompts

T = TypeVar("T")
R = TypeVar("R")

TOKENS_PER_PROMPT = 225
GPU_TOKENS_PER_S = 0.5 * 989e12 / (0.88e9 / 2)  # README, At scale: a 0.6 B encoder to half of its depth
ROWS_A_SHARD = 4096
CORES_PER_GPU = 8  # which read the corpus
CALLS_AHEAD = 6  # of an actor: tasks that it is handed at once
_FILES = 8


@dataclass(frozen=True)
class Rates:
    scanned: float  # rows a second, of a core
    joined: float  # rows a second whose keys the driver puts together
    task_s: float  # that the driver is busy with a task
    shard_s: float  # and with each shard of it

    def plan_s(self, prompts: int, cores: int) -> float:
        return prompts / (self.scanned * cores) + prompts / self.joined

    def driver_s(self, prompts: int, shards_a_task: int) -> float:
        return prompts / ROWS_A_SHARD * (self.task_s / shards_a_task + self.shard_s)


class Instant:
    """Hands back a record of a shard's size at once."""

    def __init__(self, num_rows: int) -> None:
        self.record = np.random.default_rng(0).bytes(32 * num_rows)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"digest": row["digest"], "done": pickle.dumps(self.record)}


def planning_rates(num_rows: int) -> tuple[float, float]:
    """Rows a second that a core reads, and whose keys the driver puts together."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = random_prompts(1000, seed=0)
        for part in range(_FILES):
            with (Path(folder) / f"{part}.jsonl").open("w") as file:
                rows = range(part, num_rows, _FILES)
                file.writelines(json.dumps({"prompt": f"{i} {prompts[i % 1000]}"}) + "\n" for i in rows)
        reading_s = 0.0

        def timed(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
            nonlocal reading_s
            for item in items:
                started = time.perf_counter()
                result = function(item)
                reading_s += time.perf_counter() - started
                yield result

        started = time.perf_counter()
        planned = plan(folder, ROWS_A_SHARD, spread=timed)
        whole_s = time.perf_counter() - started
        return len(planned.keys) / reading_s, len(planned.keys) / (whole_s - reading_s)


def shard_s(num_shards: int, group: int) -> float:
    """Seconds a shard that the driver takes in through Ray Data, `group` a task, of actors that take no time."""
    items = [{"digest": str(i), "task": b"x" * 200} for i in range(num_shards)]
    blocks = ray.data.from_items(items, override_num_blocks=num_shards // group)
    options = cluster.Actors(most=2).options(CALLS_AHEAD // 2)
    rows = iter(blocks.map(Instant, fn_constructor_kwargs={"num_rows": ROWS_A_SHARD}, **options).iter_rows())
    next(rows)
    started = time.perf_counter()
    num_taken = sum(len(pickle.loads(row["done"])) > 0 for row in rows)
    return (time.perf_counter() - started) / num_taken


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=2_000)
    parser.add_argument("--group", type=int, default=8, help="shards of a task, where they are several")
    arguments = parser.parse_args()
    scanned, joined = planning_rates(arguments.rows)
    with cluster.connected():
        alone, grouped = (shard_s(arguments.shards, group) for group in (1, arguments.group))
    task_s = (alone - grouped) * arguments.group / (arguments.group - 1)
    rates = Rates(scanned, joined, task_s, alone - task_s)
    tell(
        f"{'prompts':>14} {'GPUs':>5} {'GPU s':>11}         {'plan s':>9} {'driver s':>9} {'efficiency':>10} held up by"
    )
    for prompts in (10**6, 10**8, 10**9):
        for gpus in (1, 8, 64, 512, 1000):
            gpu_s = prompts * TOKENS_PER_PROMPT / GPU_TOKENS_PER_S / gpus
            size = ray_tasks.task_size(prompts // ROWS_A_SHARD, CALLS_AHEAD * gpus)
            for when, cores, shards_a_task in (("before", 1, 1), ("now", CORES_PER_GPU * gpus, size)):
                plan_s, driver_s = rates.plan_s(prompts, cores), rates.driver_s(prompts, shards_a_task)
                worst = max((plan_s, "planning"), (gpu_s, "GPUs"), (driver_s, "the driver"))[1]
                efficiency = gpu_s / (plan_s + max(gpu_s, driver_s))
                case = f"{prompts:14,} {gpus:5,} {gpu_s:11,.0f} {when:>7}"
                tell(f"{case} {plan_s:9,.0f} {driver_s:9,.0f} {efficiency:10.0%} {worst}")
    tell(json.dumps({**asdict(rates), "settings": vars(arguments), "versions": versions()}))


if __name__ == "__main__":
    main()
