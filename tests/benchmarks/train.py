"""How fast an ensemble is trained, and what training takes of memory.

    python tests/benchmarks/train.py                       all seeds at once, and one after another
    python tests/benchmarks/train.py --memory 100000,1000000   whole `train` jobs on made-up stores of these sizes

"One after another" is measured twice: as our own trainer, a seed at a time, and as people write it, a torch module with
a DataLoader. All see the same rows and the same recipe; their validation losses are printed beside the seconds. A table
and one JSON line last go to stdout.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic import write_store
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prefill_router.common.console import say
from prefill_router.predictor.counter_random import fold, seed_keys
from prefill_router.predictor.data_loader import Rows, WorkerRows
from prefill_router.predictor.recipe import Recipe
from prefill_router.predictor.training import Trainer, fit

ROOT = Path(__file__).parents[2]


def made_up_rows(num_rows: int, num_features: int, num_targets: int, seed: int) -> Rows:
    """Features whose variances fall as those of principal components, and targets that share most of what is hard."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, num_features, generator=generator)
    features *= torch.arange(1, num_features + 1) ** -0.5 * 4
    teacher = torch.Generator().manual_seed(7)
    shared = torch.randn(num_features, 16, generator=teacher)
    own = torch.randn(16, num_targets, generator=teacher) * 0.5 + 1.0
    logits = torch.tanh(features @ shared / 8) @ own
    labels = (torch.rand(num_rows, num_targets, generator=generator) < torch.sigmoid(logits)).float()
    labels[torch.rand(num_rows, num_targets, generator=generator) < 0.02] = torch.nan
    return Rows(features, labels, fold(seed_keys([seed])[0], torch.arange(num_rows)))


def ours(train: Rows, validation: Rows, recipe: Recipe, seed: int) -> list[float]:
    feed = WorkerRows([len(train)], {0: train}, {0: validation}, train[:0])
    trainer = Trainer(recipe, train.features.shape[1], [1.0] * train.labels.shape[1], seed)
    fit(feed, trainer, seed)
    return trainer.best_losses.tolist()


def plain(train: Rows, validation: Rows, recipe: Recipe, seed: int) -> float:
    """One seed as a torch module, a DataLoader and Adam."""
    torch.manual_seed(seed)
    sizes = [train.features.shape[1], *recipe.hidden]
    layers: list[nn.Module] = []
    for i, rate in enumerate(recipe.dropout):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU(), nn.Dropout(rate)]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], train.labels.shape[1]))
    optimizer = torch.optim.Adam(net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    loader = DataLoader(TensorDataset(train.features, train.labels), recipe.batch_size, shuffle=True)
    best, best_epoch, best_state = float("inf"), 0, None
    for epoch in range(recipe.max_epochs):
        net.train()
        for features, labels in loader:
            optimizer.zero_grad()
            _masked_loss(net(features), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        net.eval()
        with torch.no_grad():
            loss = _masked_loss(net(validation.features), validation.labels).item()
        if loss < best:
            best, best_epoch, best_state = loss, epoch, copy.deepcopy(net.state_dict())
        if epoch - best_epoch >= recipe.patience:
            break
    assert best_state is not None
    return best


def _masked_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    observed = ~labels.isnan()
    return nn.functional.binary_cross_entropy_with_logits(outputs[observed], labels[observed])


def race(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and validation losses of each way, a round after another so that all see the same noise."""
    recipe = replace(Recipe(), num_seeds=options.seeds)
    train = made_up_rows(options.rows, options.features, options.targets, 0)
    validation = made_up_rows(options.rows // 6, options.features, options.targets, 1)
    seeds = range(options.seeds)
    ways: dict[str, Callable[[], list[float]]] = {
        "all at once": lambda: ours(train, validation, recipe, 0),
        "all at once, in bfloat16": lambda: ours(train, validation, replace(recipe, precision="bfloat16"), 0),
        "ours, a seed at a time": lambda: [
            loss for k in seeds for loss in ours(train, validation, replace(recipe, num_seeds=1), k)
        ],
        "torch module and DataLoader": lambda: [plain(train, validation, recipe, k) for k in seeds],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            losses[name] = run()
            seconds[name].append(time.perf_counter() - started)
            say(f"{name}: {seconds[name][-1]:.1f} s, validation loss {np.mean(losses[name]):.4f}")
    first = np.median(seconds["all at once"])
    return {
        name: {
            "seconds": float(np.median(values)),
            "times_all_at_once": float(np.median(values) / first),
            "times_bfloat16": float(np.median(values) / np.median(seconds["all at once, in bfloat16"])),
            "validation_loss": float(np.mean(losses[name])),
            "validation_loss_std": float(np.std(losses[name])),
        }
        for name, values in seconds.items()
    }


def measure_jobs(sizes: Sequence[int], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory and training rate of whole `train` jobs."""
    return [_measure_job(size, options, folder / str(size)) for size in sizes]


def _measure_job(num_rows: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    say(f"{num_rows:,} rows: writing the store")
    write_store(folder, num_rows, options.hidden_size)
    command = [sys.executable, "-m", "prefill_jobs", "train", "--activations", str(folder / "activations")]
    command += ["--outcomes", str(folder / "outcomes.parquet"), "--pool", str(folder / "pool.toml")]
    command += ["--out", str(folder / "router"), "--max-epochs", str(options.max_epochs)]
    command += ["--workers", str(options.workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _pss_bytes(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"train ended with status {process.returncode}")
    training = json.loads((folder / "router" / "router.json").read_text())["training"]
    report = {
        "rows": num_rows,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak,
        "training_rows_per_s": training["metrics"]["rows_per_s"],
        "num_epochs": training["metrics"]["num_epochs"],
    }
    say(f"{num_rows:,} rows: peak {peak / 2**20:,.0f} MiB, {report['training_rows_per_s']:,.0f} rows/s")
    return report


def _pss_bytes(session: int) -> int:
    """Proportional memory of all processes of a session: what is shared counts once."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    lines = (entry / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            except (OSError, StopIteration):
                continue  # it has ended
    return total


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5700, help="training rows of the race")
    parser.add_argument("--features", type=int, default=300)
    parser.add_argument("--targets", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", type=lambda text: [int(n) for n in text.split(",")], help="rows of stores, a,b")
    parser.add_argument("--hidden-size", type=int, default=64, help="of the stores")
    parser.add_argument("--max-epochs", type=int, default=3, help="of the jobs")
    parser.add_argument("--workers", type=int, default=1, help="of the jobs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    report: dict[str, Any] = {
        "benchmark": "train",
        "hardware": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "options": vars(options),
    }
    if options.memory:
        with tempfile.TemporaryDirectory() as folder:
            report["jobs"] = measure_jobs(options.memory, options, Path(folder))
    else:
        report["ways"] = race(options)
        for name, row in report["ways"].items():
            loss = f"{row['validation_loss']:.4f} ± {row['validation_loss_std']:.4f}"
            times = f"{row['times_all_at_once']:8.1f}x{row['times_bfloat16']:8.1f}x"
            sys.stdout.write(f"{name:30}{row['seconds']:8.1f} s{times}   loss {loss}\n")
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
