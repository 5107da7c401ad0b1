"""Active samples beside random ones: what a label teaches.

    python tests/benchmarks/sampling.py --router work/router --activations work/activations \
        --outcomes outcomes.parquet --seeds 5

From 300 random prompts on, batches of 150 are drawn by chance, or by `sampling.active` from a kernel machine that is
fitted on what is known so far. Efficacy is judged at tolerance 0 on 1,500 prompts that are never drawn. One JSON line
is printed last: the efficacy at each number of prompts, and the share of a random sample's prompts with which the
active one, by curves smoothed over the logarithm of the number, reaches what that reaches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.predictions import predict_graded
from prefill_jobs.runtime import cluster
from prefill_router.predictor.kernel_ridge import fit_kernel
from prefill_router.query_log.sampling import active, at_random
from prefill_router.reports.versions import versions
from prefill_router.router.artifact import Router

Array = NDArray[Any]
_FIRST, _BATCH, _HELD_OUT = 300, 150, 1500
_SIZES = range(_FIRST, 2401, _BATCH)


def prompts(router: Router, activations: str, outcomes: str) -> tuple[Array, Array]:
    """Features (N, F) and outcomes (N, T) of the prompts with an outcome of every target."""
    with cluster.connected():
        graded = GradedStore.open(activations, outcomes, router.pool, ignore_unknown=True)
        found = predict_graded(router, graded, with_features=True)
    assert found.features is not None
    is_complete = ~np.isnan(found.correct).any(1)
    return found.features[is_complete], found.correct[is_complete]


def efficacy(p: Array, correct: Array) -> float:
    """The share of the gap between the best single target and the oracle that is closed."""
    single, oracle = correct.mean(0).max(), correct.max(1).mean()
    return float((correct[np.arange(len(p)), p.argmax(1)].mean() - single) / (oracle - single))


def learning_curve(draw: Callable[[Array, Array, int], Array], x: Array, y: Array, seed: int) -> list[float]:
    """Efficacy at each of the sizes."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    held_out, known, others = order[:_HELD_OUT], order[_HELD_OUT:][:_FIRST], order[_HELD_OUT + _FIRST :]
    contents = rng.integers(0, 1 << 63, (len(x), 2), dtype=np.uint64)
    curve = []
    for _ in _SIZES:
        machine = fit_kernel(x[known], [y[known]])
        curve.append(efficacy(machine(x[held_out]), y[held_out]))
        taken = draw(contents[others], machine(x[others]), _BATCH)
        known, others = np.concatenate([known, others[taken]]), np.delete(others, taken)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("router", "activations", "outcomes"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    x, y = prompts(Router.load(arguments.router), arguments.activations, arguments.outcomes)
    ways: dict[str, Callable[[Array, Array, int], Array]] = {
        "random": lambda contents, _, size: at_random(contents, size),
        "active": active,
    }
    curves = {
        name: np.mean([learning_curve(draw, x, y, seed) for seed in range(arguments.seeds)], axis=0)
        for name, draw in ways.items()
    }
    sizes = np.array(_SIZES)
    smooth = {
        name: np.polynomial.Polynomial.fit(np.log(sizes), curve, 2)(np.log(sizes)) for name, curve in curves.items()
    }
    reached = [int(sizes[np.argmax(smooth["active"] >= goal)]) for goal in smooth["random"]]
    shares = {int(n): round(m / n, 3) for n, m, g in zip(sizes, reached, smooth["random"], strict=True) if n >= 900}
    result = {name: dict(zip(map(int, sizes), curve.round(4).tolist(), strict=True)) for name, curve in curves.items()}
    print(json.dumps({**result, "share_of_labels": shares, "seeds": arguments.seeds, "versions": versions()}))  # noqa: T201


if __name__ == "__main__":
    main()
