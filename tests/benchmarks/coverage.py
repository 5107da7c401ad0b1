"""How often 95 % intervals contain the truth, on made-up data of which it is known.

    python tests/benchmarks/coverage.py --repetitions 500

Prompts have a difficulty, targets a skill, and the router a noisy and overconfident view of both; costs vary by prompt
and differ from those expected. The truth is a million prompts' figures. Each repetition draws prompts anew, scores two
routers, and asks whether each interval, and that of each paired difference, contains the truth. A table and one JSON
line last go to stdout; the exit status is 1 where a figure is outside of 93 to 97 %.
"""

# N prompts, T targets

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.evaluation.results import HEADLINES
from prefill_router.metrics import Scorer, bootstrap_weights, interval

Array = NDArray[np.float64]

NUM_TARGETS = 5
TOLERANCE = 0.05
BOUNDS = (0.93, 0.97)
# What reports give an interval. Not ECE, nor PDP-AUCCC, whose truth is at the edge of what they can be.
FIGURES = tuple(name.removeprefix("mean_") for name in HEADLINES)


class Sample(NamedTuple):
    correct: Array  # (N, T)
    sharp: Array  # (N, T) P(correct) as a good router has it
    dull: Array  # (N, T) as a worse one does
    cost: Array  # (N, T) as expected
    paid: Array  # (N, T)


def drawn(num_prompts: int, rng: np.random.Generator) -> Sample:
    shape = (num_prompts, NUM_TARGETS)
    ease = 1.5 * rng.normal(size=(num_prompts, 1))
    logits = ease + np.linspace(-1.0, 1.2, NUM_TARGETS) + rng.normal(size=shape)
    correct = (rng.random(shape) < 1.0 / (1.0 + np.exp(-logits))).astype(np.float64)
    sharp, dull = (1.0 / (1.0 + np.exp(-(0.7 * logits + rng.normal(0, noise, shape)))) for noise in (0.4, 0.6))
    cost = np.geomspace(0.0003, 0.01, NUM_TARGETS) * np.exp(0.3 * rng.normal(size=(num_prompts, 1)))
    return Sample(correct, sharp, dull, cost, cost * np.exp(0.3 * rng.normal(size=shape)))


def figures(sample: Sample, draws: Array) -> Array:
    """Each figure of the good router, then each less that of the worse one: (draws, 2 * figures)."""
    of_routers = []
    for p in (sample.sharp, sample.dull):
        found = Scorer(sample.correct, p, sample.cost, TOLERANCE, sample.paid).figures(draws)
        of_routers.append(np.column_stack([found[name].reshape(len(draws), -1).mean(1) for name in FIGURES]))
    sharp, dull = of_routers
    return np.concatenate([sharp, sharp - dull], axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=1500, help="in each repetition")
    parser.add_argument("--draws", type=int, default=500, help="of each bootstrap")
    parser.add_argument("--truth", type=int, default=1_000_000, help="prompts whose figures are the truth")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    rng = np.random.default_rng(options.seed)
    truth = figures(drawn(options.truth, rng), np.ones((1, options.truth)))[0]
    hits = np.zeros(len(truth))
    for repetition in range(options.repetitions):
        draws = bootstrap_weights(options.prompts, options.draws, seed=repetition)
        found = figures(drawn(options.prompts, rng), np.concatenate([np.ones((1, options.prompts)), draws]))
        ends = [interval(values[0], values[1:])[1:] for values in found.T]
        hits += [low <= true <= high for (low, high), true in zip(ends, truth, strict=True)]
    coverage = dict(zip([*FIGURES, *(f"{name}, paired" for name in FIGURES)], hits / options.repetitions, strict=True))
    lines = [f"{name:32} {true:9.4f} {coverage[name]:7.3f}" for name, true in zip(coverage, truth, strict=True)]
    outside = [name for name, share in coverage.items() if not BOUNDS[0] <= share <= BOUNDS[1]]
    report = {
        "hardware": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "options": vars(options),
        "seconds": round(time.perf_counter() - started, 1),
        "coverage": coverage,
        "outside": outside,
    }
    sys.stdout.write("\n".join(["figure, truth, coverage", *lines, json.dumps(report)]) + "\n")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
