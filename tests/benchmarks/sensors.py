"""What several sensors of a prompt are worth together, and which rule stands in for one that is missing.

    python tests/benchmarks/sensors.py --sensor minilm=embeddings.npy --prompts prompts.parquet \\
        --outcomes outcomes.parquet --pools pools.toml --num-prompts 1500

Row i of a sensor's features (N, F) belongs to row i of `prompts`. The form of the text (lengths, digits, symbols,
options) is a sensor without a model. In five folds, a kernel machine is fitted to the first sensor, to each other one,
and to all. Then each sensor is missing from the held-out prompts of the last machine: its features are their training
mean, or a ridge regression on those of the other sensors. A mean AUC over targets and folds comes with the paired 95 %
interval, over prompts, of its difference from the first sensor's, or, with one missing, from the machine without it.
One JSON line is printed last.
"""

# N prompts, T targets, F features, B draws

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefill_router.common.schema import PROMPT, PROMPT_ID, ActivationColumn
from prefill_router.corpus.split import Part, Split, prompt_hashes
from prefill_router.metrics import bootstrap_weights, interval_from_draws
from prefill_router.metrics.discrimination import TargetScores
from prefill_router.outcomes import load_outcomes, target_names
from prefill_router.policy.pool import load_pool
from prefill_router.predictor.kernel_ridge import fit_kernel
from prefill_router.probe.moments import Moments
from prefill_router.probe.projection import fit_projection
from prefill_router.reports.versions import versions

Array = NDArray[Any]
FOLDS = 5
FORM = "form"
_VARIANCE = 576.0  # of all features of a sensor together, so that none outweighs the others
_STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4)


def form(text: str) -> list[float]:
    """The features of a text that need no model: how long it is, and what it consists of."""
    words, size = text.split(), max(len(text), 1)
    numbers = re.findall(r"\d+", text)
    question = re.split(r"\n\s*\(?A[).:]", text)[0]
    counts = [len(text), len(words), len(question), text.count("\n"), len(numbers), len(re.findall(r"[\\$^]", text))]
    kinds = [str.isdigit, str.isupper, lambda c: not c.isalnum() and not c.isspace(), lambda c: not c.isascii()]
    shares = [sum(map(kind, text)) / size for kind in kinds]
    diversity = len(set(words)) / max(len(words), 1)
    options = len(re.findall(r"^\s*\(?[A-J][).:]", text, re.MULTILINE))
    marks = [text.count("?"), text.count("=") > 0, "not" in words, options, len(question) / size]
    longest = max(map(len, numbers), default=0)
    return [*np.log1p([*counts, longest]), *shares, *marks, diversity, len(text) / max(len(words), 1)]


def standard(x: Array, train: Array) -> Array:
    """Features as the router reads them, with the total variance of any other sensor."""
    features = fit_projection(ActivationColumn("mean", 0), Moments.of(x[train]))(x)
    return np.asarray(features * np.sqrt(_VARIANCE / features[train].var(0).sum()), np.float32)


def regressed(seen: Array, missing: Array, train: Array) -> Array:
    """The missing features (N, F) by ridge regression on those that are seen, of the least leave-one-out error."""
    x, y = seen.astype(np.float64), missing[train]
    x, mean = x - x[train].mean(0), y.mean(0)
    values, vectors = np.linalg.eigh(x[train].T @ x[train])
    rotated = x @ vectors
    target = rotated[train].T @ (y - mean)

    def error(strength: float) -> float:
        residuals = y - mean - rotated[train] @ (target / (values + strength)[:, None])
        leverage = (rotated[train] ** 2 / (values + strength)).sum(1) + 1.0 / len(y)
        return float(((residuals / (1.0 - leverage)[:, None]) ** 2).mean())

    strength = min(_STRENGTHS, key=error)
    return np.asarray(mean + rotated @ (target / (values + strength)[:, None]), np.float32)


def predictions(sensors: Mapping[str, Array], correct: Array, train: Array) -> dict[str, Array]:
    """P(correct) (N, T) of each machine, and of the joint one where a sensor is missing."""
    x = {name: standard(values, train) for name, values in sensors.items()}

    def joined(parts: Mapping[str, Array]) -> Array:
        return np.concatenate([parts[name] for name in x if name in parts], axis=1)

    joint = fit_kernel(joined(x)[train], [correct[train]])
    found = {name: fit_kernel(own[train], [correct[train]])(own) for name, own in x.items()}
    found["all"] = joint(joined(x))
    for name, own in x.items():
        others = joined({other: values for other, values in x.items() if other != name})
        mean = np.broadcast_to(own[train].mean(0), own.shape)
        found[f"without {name}"] = fit_kernel(others[train], [correct[train]])(others)
        found[f"{name} is its mean"] = joint(joined(x | {name: mean}))
        found[f"{name} is regressed"] = joint(joined(x | {name: regressed(others, own, train)}))
    return found


def aucs(correct: Array, p: Array, fold: Array, draws_BN: Array) -> Array:
    """The mean AUC (B,) over targets and folds."""
    found = []
    for t, k in np.ndindex(correct.shape[1], FOLDS):
        rows = (fold == k) & ~np.isnan(correct[:, t])
        found.append(TargetScores(correct[rows, t], p[rows, t]).auc(draws_BN[:, rows].astype(np.float64)))
    return np.asarray(np.mean(found, axis=0))


def baseline(router: str, first: str) -> str:
    """The router that another is compared with."""
    missing = re.fullmatch("(.+) is (?:its mean|regressed)", router)
    return f"without {missing[1]}" if missing else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompts", "outcomes", "pools"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--sensor", action="append", required=True, metavar="NAME=FILE", help="features, .npy")
    parser.add_argument("--num-prompts", type=int, help="a random sample; all by default")
    parser.add_argument("--draws", type=int, default=300, help="of the bootstrap")
    options = parser.parse_args()
    table = pq.read_table(options.prompts, columns=[PROMPT_ID, PROMPT]).to_pylist()
    sample = np.random.default_rng(0).permutation(len(table))[: options.num_prompts]
    texts, ids = ([table[i][column] for i in sample] for column in (PROMPT, PROMPT_ID))
    sensors = {name: np.load(path)[sample] for name, path in (sensor.split("=", 1) for sensor in options.sensor)}
    sensors[FORM] = np.array([form(text) for text in texts], np.float32)
    names = target_names(options.outcomes)
    correct = load_outcomes(options.outcomes, names).at(prompt_hashes(ids)).correct
    p: dict[str, Array] = {}
    fold = np.zeros(len(texts), int)
    for k in range(FOLDS):
        test = Split(folds=FOLDS, fold=k, test_fraction=1.0 / FOLDS).parts(prompt_hashes(texts)) == Part.TEST
        fold[test] = k
        for router, values in predictions(sensors, correct, ~test).items():
            p.setdefault(router, np.zeros_like(correct))[test] = values[test]
    draws, report = bootstrap_weights(len(texts), options.draws, all_first=True), {}
    for pool in tomllib.loads(Path(options.pools).read_text()):
        own = [names.index(target) for target in load_pool(f"{options.pools}#{pool}").target_names]
        drawn = {router: aucs(correct[:, own], values[:, own], fold, draws) for router, values in p.items()}
        for router, values in drawn.items():
            less = interval_from_draws(values - drawn[baseline(router, next(iter(sensors)))])
            report[f"{pool}, {router}"] = [float(values[0]), *less]
            sys.stdout.write(
                f"{pool:10} {router:24} {values[0]:.4f}  {less.value:+.4f} ({less.low:+.4f}, {less.high:+.4f})\n"
            )
    sys.stdout.write(json.dumps({"auc": report, "prompts": len(texts), "versions": versions()}) + "\n")


if __name__ == "__main__":
    main()
