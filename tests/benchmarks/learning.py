"""Does a learning curve tell what more prompts bring? Curves of quarters of the prompts beside what all brought.

    python tests/benchmarks/learning.py --features features.npy --prompts prompts.parquet --outcomes outcomes.parquet \
        --pools pools.toml --splits 3

Row i of `features` (N, F) belongs to row i of `prompts`. Of each pool and split, a fifth is held out, a curve is made
of all other prompts, and one of each quarter of them, whose outlooks on twice and four times as many are held against
the first. One JSON line is printed last: mean gains as told and as found, their mean absolute error, the share of
intervals that hold the truth, that of silence, and the seconds that a curve of all takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefill_router.common.console import say
from prefill_router.common.schema import PROMPT_ID
from prefill_router.corpus.split import prompt_hashes
from prefill_router.evaluation.contenders import Contender, HeldOut, scoring
from prefill_router.evaluation.learning_curve import LearningCurve, Score, learning_curve
from prefill_router.outcomes import Answers, load_outcomes
from prefill_router.policy.pool import Pool, load_pool
from prefill_router.predictor.answer_length import median_logs, median_tokens
from prefill_router.predictor.kernel_ridge import fit_kernel
from prefill_router.reports.versions import versions

Array = NDArray[Any]
_PROMPT_TOKENS = 230  # the mean: prompts are priced alike
_FIRST = 1000  # prompts whose kernel machine says how difficult the held-out ones are


def scored_as(pool: Pool, x: Array, answers: Answers, held_out: Array, others: Array) -> Score:
    prompts = HeldOut(
        np.full(len(held_out), _PROMPT_TOKENS), answers.correct[held_out], answers.output_tokens[held_out]
    )
    p = fit_kernel(x[others[:_FIRST]], [answers.correct[others[:_FIRST]]])(x[held_out])
    lengths = np.broadcast_to(median_tokens(median_logs(answers.output_tokens[others])), p.shape)
    return scoring(pool, prompts, Contender("first", "first", p, lengths, 0.0))


def compared(all_: LearningCurve, quarter: LearningCurve) -> list[dict[str, Any]]:
    """What a quarter's outlooks told, beside what was measured at its size and at twice and four times that."""
    rows = []
    for name, learned in quarter.figures.items():
        small, *larger = (measured.value for measured in all_.figures[name].measured[-3:])
        rows += [
            {"of": f"{name} x{o.times}", "told": o.gain, "found": value - small, "silent": False}
            for o, value in zip(learned.outlooks, larger, strict=False)
        ]
        if learned.silence:
            rows += [{"of": f"{name} x{times}", "silent": True} for times in (2, 4)]
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    told = np.array([row["told"] for row in rows if not row["silent"]]).reshape(-1, 3)
    found = np.array([row["found"] for row in rows if not row["silent"]])
    return {
        "told": told[:, 0].mean(),
        "found": found.mean(),
        "error": np.abs(told[:, 0] - found).mean(),
        "held": ((told[:, 1] <= found) & (found <= told[:, 2])).mean(),
        "width": (told[:, 2] - told[:, 1]).mean(),
        "silent": 1.0 - len(found) / len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("features", "prompts", "outcomes", "pools"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pool", action="append", help="all by default")
    parser.add_argument("--splits", type=int, default=3)
    arguments = parser.parse_args()
    x = np.load(arguments.features)
    keys = prompt_hashes(pq.read_table(arguments.prompts)[PROMPT_ID].to_pylist())
    rows, seconds = defaultdict(list), []
    for name in arguments.pool or tomllib.loads(Path(arguments.pools).read_text()):
        pool = load_pool(f"{arguments.pools}#{name}")
        answers = load_outcomes(arguments.outcomes, pool.target_names).at(keys)
        for split in range(arguments.splits):
            held_out, others = np.split(np.random.default_rng(split).permutation(len(x)), [len(x) // 5])
            others = others[: len(others) // 4 * 4]
            score = scored_as(pool, x, answers, held_out, others)
            start = time.perf_counter()
            all_ = learning_curve(x[others], answers.correct[others], x[held_out], score)
            seconds.append(time.perf_counter() - start)
            for part in np.split(others, 4):
                quarter = learning_curve(x[part], answers.correct[part], x[held_out], score)
                for row in compared(all_, quarter):
                    rows[row["of"]].append(row)
            values = {figure: [round(m.value, 4) for m in of.measured] for figure, of in all_.figures.items()}
            say(f"{name}, split {split}: {all_.sizes}, {values}")
    found = {of: summary(of_kind) for of, of_kind in rows.items()}
    result = {"figures": found, "prompts": all_.sizes[-1], "seconds": np.mean(seconds), "versions": versions()}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
