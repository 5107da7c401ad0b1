"""Layer probes beside what they replace: 5-fold cross-validated logistic regression on every layer.

    python tests/benchmarks/probe.py --activations work/activations --outcomes outcomes.parquet

Our probe of all columns and targets is timed whole, through Ray, and alone, in this process on columns that lie in
memory. The sweep (standardise, PCA to 100, logistic regression, all fitted inside each fold) is timed on every column
for some targets and scaled to all. How far the AUC of a target's chosen column is from the best of the sweep tells
whether they agree. J is compared with the plain formula in numpy; where it differs, the exit status is 1. A table
and one JSON line last go to stdout.

Where the store's prompt_ids are hashes of the prompts, --prompts names a Parquet file with the prompt of each prompt_id
of the outcomes.
"""

# N prompts, T targets, C columns

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.runtime import cluster
from prefill_jobs.train.probe_job import probe_store
from prefill_router.common.console import say
from prefill_router.common.schema import PROMPT, PROMPT_ID, TARGET, ActivationColumn
from prefill_router.corpus.reader import content_hash
from prefill_router.outcomes import target_names
from prefill_router.policy.pool import Pool, Target
from prefill_router.probe.layer_scores import SHRINKAGE, LayerProbe, choose, joint_columns, probe_column
from prefill_router.probe.moments import LabelledMoments

FOLDS = 5
PCA_SIZE = 100
WANTED_SPEEDUP = 50.0
WANTED_AUC_GAP = 0.005
_CHECKED_COLUMNS = 3
_J_TOLERANCE = 1e-6


@dataclass
class Sweep:
    """Cross-validated AUC of columns and targets, and what it took."""

    auc_CT: NDArray[np.float64]
    project_s: float = 0.0  # scaler and PCA
    fit_s: float = 0.0  # the regression and its scores
    pairs: int = 0
    unfinished: int = field(default=0)  # fits that ran into max_iter

    @property
    def seconds(self) -> float:
        return self.project_s + self.fit_s

    def add(self, c: int, t: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        self.auc_CT[c, t] = np.mean([self._fold(x, y, train, test) for train, test in folds.split(x, y)])
        self.pairs += 1

    def _fold(self, x: NDArray[Any], y: NDArray[Any], train: NDArray[Any], test: NDArray[Any]) -> float:
        started = time.perf_counter()
        project = make_pipeline(StandardScaler(), PCA(PCA_SIZE, svd_solver="covariance_eigh", whiten=True))
        train_x, test_x = project.fit_transform(x[train]), project.transform(x[test])
        projected = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model = LogisticRegression(max_iter=200).fit(train_x, y[train])
        auc = float(roc_auc_score(y[test], model.decision_function(test_x)))
        self.project_s += projected - started
        self.fit_s += time.perf_counter() - projected
        self.unfinished += len(caught)
        return auc


def load(graded: GradedStore, column: ActivationColumn) -> tuple[NDArray[np.float16], ...]:
    """One column of the whole store (N, D), whether targets were right (N, T), and the prompts' hashes."""
    shards = graded.batches(column, range(graded.store.num_shards))
    return tuple(map(np.concatenate, zip(*shards, strict=True)))


def time_alone(graded: GradedStore, probes: Sequence[LayerProbe]) -> dict[str, Any]:
    """Seconds for moments and for probes of a column in memory, and how far its J is from the plain formula."""
    columns = graded.store.columns
    chosen = [columns[i] for i in np.linspace(1, len(columns) - 1, _CHECKED_COLUMNS).astype(int)]
    moments_s, probes_s, error = 0.0, 0.0, 0.0
    targets = graded.pool.target_names
    for column in chosen:
        x, correct, keys = load(graded, column)
        started = time.perf_counter()
        moments = LabelledMoments.of(x, correct, keys)
        ended = time.perf_counter()
        rows = probe_column("", column, targets, moments)
        moments_s, probes_s = moments_s + ended - started, probes_s + time.perf_counter() - ended
        whole = {p.target: p for p in probes if p.column == column}
        for t in (0, len(targets) - 1):
            expected = _plain_fisher(x.astype(np.float64), correct[:, t])
            for found in (rows[t].fisher_j, whole[targets[t]].fisher_j):
                error = max(error, abs(found - expected) / abs(expected))
    scale = len(columns) / len(chosen)
    return {
        "columns": [column.name for column in chosen],
        "moments_seconds_of_all": moments_s * scale,
        "probes_seconds_of_all": probes_s * scale,
        "seconds_of_all": (moments_s + probes_s) * scale,
        "worst_relative_error_of_j": error,
        "agrees": error < _J_TOLERANCE,
    }


def _plain_fisher(x: NDArray[Any], y: NDArray[Any]) -> float:
    """METHOD's formula as it stands."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)].astype(np.float64)
    p1 = y.mean()
    delta = np.average(x, 0, weights=y) - np.average(x, 0, weights=1 - y)
    within = p1 * np.cov(x.T, aweights=y, ddof=0) + (1 - p1) * np.cov(x.T, aweights=1 - y, ddof=0)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * np.diag(np.diag(within))
    return float(p1 * (1 - p1) * delta @ np.linalg.solve(within, delta))


def sweep_targets(graded: GradedStore, targets: Sequence[str]) -> Sweep:
    """The sweep over every column for `targets`. A column that never varies tells nothing: AUC 0.5."""
    columns = graded.store.columns
    sweep = Sweep(np.full((len(columns), len(targets)), 0.5))
    for c, column in enumerate(columns):
        x, correct, _ = load(graded, column)
        x = x.astype(np.float32)
        for t, target in enumerate(targets):
            y = correct[:, graded.pool.target_names.index(target)]
            rows = ~np.isnan(y)
            if x.std(0).any():
                sweep.add(c, t, x[rows], y[rows] > 0.5)
        aucs = " ".join(f"{auc:.4f}" for auc in sweep.auc_CT[c])
        say(f"sweep: {column.name}: {aucs}, {sweep.seconds:.0f} s so far")
    return sweep


def agreement(probes: Sequence[LayerProbe], sweep: Sweep, graded: GradedStore, targets: Sequence[str]) -> list[Any]:
    """For each target the column that we chose and the sweep's best, with their AUC by the sweep."""
    chosen, columns = choose(probes), graded.store.columns
    joint = [columns.index(column) for column in joint_columns(probes)]
    rows = []
    for t, target in enumerate(targets):
        auc_C, ours = sweep.auc_CT[:, t], columns.index(chosen[target].column)
        j_C = np.array(
            [next(p.fisher_j_corrected for p in probes if (p.column, p.target) == (c, target)) for c in columns]
        )
        rows.append(
            {
                "target": target,
                "chosen": columns[ours].name,
                "auc_of_chosen": float(auc_C[ours]),
                "best": columns[int(auc_C.argmax())].name,
                "auc_of_best": float(auc_C.max()),
                "gap": float(auc_C.max() - auc_C[ours]),
                "gap_of_joint_set": float(auc_C.max() - auc_C[joint].max()),
                "rank_correlation": float(np.corrcoef(j_C.argsort().argsort(), auc_C.argsort().argsort())[0, 1]),
            }
        )
    return rows


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    outcomes = str(options.outcomes)
    if options.prompts:
        outcomes = str(folder / "outcomes.parquet")
        _write_by_content(options.outcomes, options.prompts, outcomes)
    names = target_names(outcomes)
    pool = Pool(name="all", targets=tuple(Target(name=name, input_price=1.0, output_price=1.0) for name in names))
    graded = GradedStore.open(str(options.activations), outcomes, pool, ignore_unknown=False)
    started = time.perf_counter()
    cluster.connect()
    connected = time.perf_counter()
    seconds = []
    for _ in range(options.rounds):
        begun = time.perf_counter()
        probes = probe_store(graded)
        seconds.append(time.perf_counter() - begun)
        say(f"probe_store: {seconds[-1]:.1f} s")
    alone = time_alone(graded, probes)
    report = describe(options, graded) | {
        "ours": {"seconds": float(np.median(seconds)), "rounds": seconds, "ray_start_seconds": connected - started},
        "alone": alone,
        "joint_columns": [column.name for column in joint_columns(probes)],
        "agrees": alone["agrees"],
    }
    return report if options.targets == "none" else report | compare(options, graded, probes, float(np.median(seconds)))


def compare(
    options: argparse.Namespace, graded: GradedStore, probes: Sequence[LayerProbe], ours_s: float
) -> dict[str, Any]:
    names = graded.pool.target_names
    spaced = [names[i] for i in np.linspace(0, len(names) - 1, min(options.sample, len(names))).astype(int)]
    targets = options.targets.split(",") if options.targets else spaced
    sweep = sweep_targets(graded, targets)
    scale = len(names) / len(targets)
    rows = agreement(probes, sweep, graded, targets)
    return {
        "sweep": {
            "pairs": sweep.pairs,
            "seconds_of_sample": sweep.seconds,
            "seconds_of_all": sweep.seconds * scale,
            # If targets that miss different prompts could share scaler and PCA, which they cannot quite:
            "seconds_of_all_if_targets_shared_pca": sweep.fit_s * scale + sweep.project_s / len(targets),
            "fits_that_did_not_converge": sweep.unfinished,
            "auc": {c.name: auc.tolist() for c, auc in zip(graded.store.columns, sweep.auc_CT, strict=True)},
        },
        "times_as_fast": sweep.seconds * scale / ours_s,
        "times_as_fast_if_targets_shared_pca": (sweep.fit_s * scale + sweep.project_s / len(targets)) / ours_s,
        "agreement": rows,
        "worst_gap": max(row["gap"] for row in rows),
        "mean_gap": float(np.mean([row["gap"] for row in rows])),
    }


def _write_by_content(outcomes: Path, prompts: Path, out: str) -> None:
    """The outcomes with each prompt_id replaced by the hash of its prompt; a prompt that repeats keeps the first."""
    table = pq.read_table(prompts, columns=[PROMPT_ID, PROMPT]).to_pydict()
    hashes = dict(zip(table[PROMPT_ID], map(content_hash, table[PROMPT]), strict=True))
    graded = pq.read_table(outcomes)
    ids = [hashes[prompt_id] for prompt_id in graded[PROMPT_ID].to_pylist()]
    first = {pair: i for i, pair in reversed(list(enumerate(zip(ids, graded[TARGET].to_pylist(), strict=True))))}
    index = graded.schema.get_field_index(PROMPT_ID)
    pq.write_table(graded.set_column(index, PROMPT_ID, pa.array(ids)).take(sorted(first.values())), out)


def describe(options: argparse.Namespace, graded: GradedStore) -> dict[str, Any]:
    """Hardware, versions and configuration."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    libraries = ("torch", "numpy", "ray", "scikit-learn", "pyarrow")
    return {
        "benchmark": "probe",
        "hardware": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg(),
        },
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in libraries},
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "encoder": graded.store.manifest.encoder.spec.model,
        "hidden_size": graded.store.manifest.encoder.hidden_size,
        "prompts": len(graded.graded_keys),
        "columns": len(graded.store.columns),
        "num_targets": len(graded.pool.targets),
        "shrinkage": SHRINKAGE,
        "sweep_folds": FOLDS,
        "sweep_pca": PCA_SIZE,
    }


def table(report: dict[str, Any]) -> str:
    ours, alone = report["ours"]["seconds"], report["alone"]
    lines = [
        f"{report['columns']} columns, {report['num_targets']} targets, {report['prompts']:,} prompts",
        f"{'our probe, through Ray':44}{ours:10.1f} s",
        f"{'our probe, alone, in memory':44}{alone['seconds_of_all']:10.1f} s",
        f"J off by {alone['worst_relative_error_of_j']:.1e}: {'agrees' if alone['agrees'] else 'DIFFERS'}",
        f"joint columns: {', '.join(report['joint_columns'])}",
    ]
    if sweep := report.get("sweep"):
        bar = f"wanted {WANTED_SPEEDUP:.0f}"
        times = f"{report['times_as_fast']:8.0f}x ours, {bar}"
        shared = sweep["seconds_of_all_if_targets_shared_pca"]
        lines.append(
            f"{'sweep, scaled from ' + str(sweep['pairs']) + ' pairs':44}{sweep['seconds_of_all']:10,.0f} s {times}"
        )
        times = f"{report['times_as_fast_if_targets_shared_pca']:8.0f}x ours"
        lines.append(f"{'the same, if targets shared their PCA':44}{shared:10,.0f} s {times}")
        lines.append(f"{'target':38}{'chosen':>9}{'AUC':>8}{'best':>10}{'AUC':>8}{'gap':>9}{'joint':>9}{'rank r':>8}")
        for row in report["agreement"]:
            lines.append(
                f"{row['target']:38}{row['chosen']:>9}{row['auc_of_chosen']:8.4f}{row['best']:>10}"
                f"{row['auc_of_best']:8.4f}{row['gap']:9.4f}{row['gap_of_joint_set']:9.4f}{row['rank_correlation']:8.2f}"
            )
        gaps = f"worst gap {report['worst_gap']:.4f}, mean {report['mean_gap']:.4f}"
        lines.append(f"{gaps}, wanted at most {WANTED_AUC_GAP}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, required=True, help="store with the columns to compare")
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="Parquet with prompt_id and prompt; the store's ids are hashes")
    parser.add_argument("--sample", type=int, default=6, help="targets of the sweep, evenly spaced by name")
    parser.add_argument("--targets", help="targets of the sweep, as a,b, or none: no sweep")
    parser.add_argument("--rounds", type=int, default=3, help="times that our probe runs; the median counts")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where J differs from the plain formula."""
    with tempfile.TemporaryDirectory() as folder:
        report = measure(parse(arguments), Path(folder))
    sys.stdout.write(f"{table(report)}\n{json.dumps(report)}\n")
    return int(not report["agrees"])


if __name__ == "__main__":
    sys.exit(main())
