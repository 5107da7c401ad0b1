"""Fits the trunk and the length net on Ray Train. Each worker holds its own shards' features in memory."""

# N prompts, T targets, F features

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import safetensors.torch
import torch
from ray.train import Checkpoint, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from prefill_jobs import cluster
from prefill_jobs.graded import GradedStore
from prefill_router import storage
from prefill_router.errors import UserError
from prefill_router.length import LengthScale
from prefill_router.projection import Projection
from prefill_router.split import Part, Split
from prefill_router.trunk import Examples, Recipe, SharedTrunkNet, fit_trunk

_WEIGHTS = "nets.safetensors"


@dataclass(frozen=True)
class FitTask:
    """What the workers need. `graded` holds the outcomes of the prompts that training may see, and no others."""

    graded: GradedStore
    split: Split
    projections: list[Projection]
    length_scale: LengthScale
    recipe: Recipe
    length_recipe: Recipe | None  # None where no length is known: the scale alone tells it
    seed: int


@dataclass(frozen=True)
class FittedNets:
    trunk: SharedTrunkNet
    length: SharedTrunkNet
    metrics: dict[str, Any]


def fit_on_ray(task: FitTask, workers: int, out: str) -> FittedNets:
    """Runs `task` on `workers` Ray Train workers; `out` lends a folder for the run, which is gone afterwards."""
    runs = storage.join(out, "_runs")
    filesystem, path = storage.arrow_location(runs)
    trainer = TorchTrainer(
        _fit_worker,
        train_loop_config={"task": task, "threads": cluster.threads_per_worker(workers)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": cluster.cpus_per_worker(workers)}
        ),
        run_config=RunConfig(name=f"train-{uuid.uuid4().hex[:8]}", storage_path=path, storage_filesystem=filesystem),
    )
    try:
        result = _fit(trainer)
        assert result.checkpoint is not None
        assert result.metrics is not None
        with result.checkpoint.as_directory() as folder:
            tensors = safetensors.torch.load_file(Path(folder) / _WEIGHTS)
    finally:
        storage.remove(runs)
    trunk, length = (
        SharedTrunkNet.from_state({n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)})
        for p in ("trunk.", "length.")
    )
    return FittedNets(trunk, length, result.metrics)


def _fit(trainer: TorchTrainer) -> Result:
    """Runs the trainer; a UserError of a worker is raised as itself."""
    try:
        return trainer.fit()
    except TrainingFailedError as failure:
        for error in getattr(failure, "worker_failures", {}).values():
            if isinstance(error, UserError):
                raise error from None
        raise


def _fit_worker(config: dict[str, Any]) -> None:
    """One worker: loads every world-size-th shard, fits together with the others; the first reports the result."""
    task: FitTask = config["task"]
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    shards = range(context.get_world_rank(), task.graded.store.num_shards, context.get_world_size())
    rows = _load(task, shards)
    trunk = fit_trunk(*rows.examples(rows.correct), task.recipe, task.seed)
    metrics = {
        "validation_losses": trunk.validation_losses,
        "best_epochs": trunk.best_epochs,
        "num_epochs": trunk.num_epochs,
    }
    length = SharedTrunkNet([rows.features.shape[1], rows.correct.shape[1]], num_seeds=1)
    if task.length_recipe is not None:
        length = fit_trunk(*rows.examples(rows.lengths), task.length_recipe, task.seed).net
    tensors = {
        f"{name}.{n}": t
        for name, net in (("trunk", trunk.net), ("length", length))
        for n, t in net.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if context.get_world_rank() == 0:
            safetensors.torch.save_file(tensors, Path(folder) / _WEIGHTS)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)


@dataclass(frozen=True)
class _Rows:
    features: torch.Tensor  # (N, F)
    correct: torch.Tensor  # (N, T)
    lengths: torch.Tensor  # (N, T), standardised logs
    parts: torch.Tensor  # (N,)

    def examples(self, labels: torch.Tensor) -> tuple[Examples, Examples]:
        """The train and the validation examples of this worker."""
        train, validation = (self.parts == part for part in (Part.TRAIN, Part.VALIDATION))
        return Examples(self.features[train], labels[train]), Examples(self.features[validation], labels[validation])


def _load(task: FitTask, shards: Sequence[int]) -> _Rows:
    """The rows of `shards` that have outcomes; none of any shard is fine, for other workers have some."""
    columns = [projection.column for projection in task.projections]
    num_targets = len(task.graded.pool.targets)
    features = [np.empty((0, sum(p.num_features for p in task.projections)), np.float32)]
    correct, lengths = [np.empty((0, num_targets), np.float32)], [np.empty((0, num_targets), np.float32)]
    parts = [np.empty(0, np.int8)]
    for shard in shards:
        ids, activations = task.graded.store.read(shard, columns)
        outcomes = task.graded.outcomes.align(ids)
        kept = ~np.isnan(outcomes.correct).all(1)
        projected = [projection(activations[projection.column.name]) for projection in task.projections]
        features.append(np.concatenate(projected, axis=1)[kept])
        correct.append(outcomes.correct[kept])
        lengths.append(task.length_scale.standardised(outcomes.output_tokens)[kept])
        parts.append(task.split.parts(ids.to_pylist())[kept])
    return _Rows(*(torch.from_numpy(np.concatenate(arrays)) for arrays in (features, correct, lengths, parts)))
