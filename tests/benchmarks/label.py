"""`label` on a log beside `extract` on its unique prompts: prompts a second, and memory at a tenth of the lines.

    PYTHONPATH=tests python tests/benchmarks/label.py --router work/router --lines 50000

Three tenths of the lines repeat a prompt. Both are jobs of their own, one after the other, on the same cores; a rate is
over the whole job, Ray's start included. The decisions are checked: one for each line. One JSON line is printed last.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from chaos.job import ExtractJob, Job, LabelJob
from prefill_router.reports.versions import versions
from prefill_router.router.artifact import Router

_REPEATS = 0.3
_WORDS = [
    "river",
    "lake",
    "sum",
    "prime",
    "number",
    "city",
    "ocean",
    "proof",
    "cell",
    "atom",
    "law",
    "price",
    "tax",
    "war",
    "king",
    "poem",
    "stone",
    "light",
]


def write_log(path: Path, num_lines: int, seed: int = 0) -> int:
    """A log of `num_lines`; returns how many of its prompts are unique."""
    rng = random.Random(seed)
    num_unique = round(num_lines * (1 - _REPEATS))
    unique = [
        f"Question {i}: what of {' and '.join(rng.choices(_WORDS, k=rng.randint(3, 12)))}?" for i in range(num_unique)
    ]
    lines = unique + rng.choices(unique, k=num_lines - num_unique)
    rng.shuffle(lines)
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return num_unique


def watched(job: Job) -> tuple[float, float]:
    """Seconds that a job takes, and the most memory that it holds, in MiB."""
    started, most = time.monotonic(), 0
    while job.process.poll() is None:
        most = max(most, job.pss_bytes())
        time.sleep(0.5)
    job.wait(10)
    return time.monotonic() - started, most / 2**20


def measure(router: str, num_lines: int, folder: Path, *, with_extract: bool) -> dict[str, Any]:
    log = folder / f"{num_lines}.jsonl"
    num_unique = write_log(log, num_lines)
    out = folder / f"label-{num_lines}"
    seconds, memory = watched(LabelJob(folder / "label.log", router=router, log=log, out=out))
    decided = [pq.ParquetFile(file).read(["row"])["row"].to_pylist() for file in (out / "decisions").rglob("*.parquet")]
    assert sorted(row for rows in decided for row in rows) == list(range(num_lines)), "a line without its decision"
    found = {"lines": num_lines, "unique": num_unique, "seconds": seconds, "memory_mib": memory}
    if with_extract:
        identity = Router.load(router).encoders[""]
        columns = Router.load(router).columns
        layers = ",".join(str(layer) for layer in sorted({column.layer for column in columns}))
        extract = ExtractJob(
            folder / "extract.log",
            corpus=log,
            encoder=identity.spec.model,
            layers=layers,
            out=folder / f"extract-{num_lines}",
        )
        found["extract_seconds"], found["extract_memory_mib"] = watched(extract)
        found["of_extract"] = found["extract_seconds"] / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--router", required=True)
    parser.add_argument("--lines", type=int, default=50_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = measure(arguments.router, arguments.lines // 10, folder, with_extract=False)
        large = measure(arguments.router, arguments.lines, folder, with_extract=True)
    result = {"small": small, "large": large, "memory": large["memory_mib"] / small["memory_mib"]}
    print(json.dumps({**result, "versions": versions()}))  # noqa: T201


if __name__ == "__main__":
    main()
