"""Fits the trunk on Ray Train.

Each worker projects its shards once into files on its local disk, and streams windows of them. The training state is
checkpointed after every epoch: a worker or run that dies resumes from there and reaches the same result.
"""

# N rows of a shard, T targets, F features

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.runtime import cluster
from prefill_jobs.runtime.job_metrics import TrainMetrics
from prefill_jobs.runtime.worker_notes import WorkerNote
from prefill_jobs.train.rendezvous import torch_config
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.common.scratch import ScratchFolder
from prefill_router.corpus.split import Part, Split
from prefill_router.predictor.data_loader import Rows, WorkerRows
from prefill_router.predictor.recipe import Recipe
from prefill_router.predictor.training import FittedTrunk, Trainer, fit
from prefill_router.probe.projection import Projection

_T = TypeVar("_T")
_STATE = "state.safetensors"
_MAX_FAILURES = 8
_POLL_S = "0.1"  # Ray Train's controller takes one report per poll; its default interval of 2 s would delay epochs


@dataclass(frozen=True)
class FitTask:
    """Inputs of the workers. Only outcomes of training and validation prompts are visible in `graded`."""

    graded: GradedStore
    split: Split
    projections: list[Projection]
    recipe: Recipe
    weights: Sequence[float]  # (T,) loss weight of each target's answers
    seed: int

    @property
    def num_features(self) -> int:
        return sum(projection.num_features for projection in self.projections)

    def trainer(self, device: torch.device) -> Trainer:
        return Trainer(self.recipe, self.num_features, self.weights, self.seed, device)


@dataclass(frozen=True)
class Fit:
    trunk: FittedTrunk
    rows_per_s: float  # training rows per second of all workers together

    def to_dict(self) -> dict[str, Any]:
        """The metrics of training, without the weights."""
        trunk = self.trunk
        return {
            "validation_losses": trunk.validation_losses,
            "best_epochs": trunk.best_epochs,
            "num_epochs": trunk.num_epochs,
            "rows_per_s": self.rows_per_s,
        }


def fit_on_ray(task: FitTask, workers: int, out: str, name: str) -> Fit:
    """Runs `task` on `workers` Ray Train workers.

    The run's files are in a temporary folder below `out`. An interrupted run of the same `name` is resumed.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    runs = storage.join(out, "_runs")
    filesystem, path = storage.arrow_location(runs)
    use_gpu = cluster.num_gpus() >= workers
    note = WorkerNote()
    run = TorchTrainer(
        _fit_worker,
        train_loop_config={"task": task, "threads": cluster.threads_per_worker(workers), "note": note},
        torch_config=torch_config("nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cluster.cpus_per_worker(workers)}
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with note.shown("train", "starting the workers"):
        result = _beside(run.fit)
    assert result.metrics is not None
    if problem := result.metrics.get("problem"):
        storage.remove(runs)
        raise UserError(problem)
    trainer = task.trainer(torch.device("cpu"))
    assert result.checkpoint is not None
    _load_checkpoint(result.checkpoint, trainer)
    storage.remove(runs)
    return Fit(trainer.fitted(), result.metrics["rows_per_s"])


def _beside(call: Callable[[], _T]) -> _T:
    """Calls in a thread of its own, so that Ctrl-C ends the job.

    In the main thread `TorchTrainer.fit` handles it instead: it says nothing, and waits for its workers to start.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="fit").start()
    return result.result()


def _fit_worker(config: dict[str, Any]) -> None:
    """Runs one worker, which takes every world-size-th shard and fits together with the others."""
    task: FitTask = config["task"]
    torch.set_num_threads(config["threads"])
    device = ray.train.torch.get_device()
    with ScratchFolder() as scratch:
        feed, problem = None, None
        try:
            context = ray.train.get_context()
            rank, note = context.get_world_rank(), config["note"]
            tell = note.write if rank == 0 else None
            feed = project(task, scratch.path, device, rank, context.get_world_size(), tell)
        except (UserError, OSError) as error:
            problem = str(error)
        # Every worker must report, and Ray Train should not retry after a user's error.
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if found := next(filter(None, problems), None):
            ray.train.report({"problem": found})
            return
        assert feed is not None
        trainer = task.trainer(device)
        if checkpoint := ray.train.get_checkpoint():
            _load_checkpoint(checkpoint, trainer)
        metrics = TrainMetrics()
        fit(feed, trainer, task.seed, lambda rows_per_s: _report(trainer, rows_per_s, metrics, config["note"]))


def _report(trainer: Trainer, rows_per_s: float, metrics: TrainMetrics, note: WorkerNote) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            safetensors.torch.save_file(trainer.state(), Path(folder) / _STATE)
            checkpoint = Checkpoint.from_directory(folder)
            loss = float(trainer.best_losses.mean())
            metrics.epoch(trainer.epoch, loss)
            note.write(f"epoch {trainer.epoch} of at most {trainer.recipe.max_epochs}, validation loss {loss:.4f}")
        ray.train.report({"rows_per_s": rows_per_s}, checkpoint=checkpoint)


def _load_checkpoint(checkpoint: Checkpoint, trainer: Trainer) -> None:
    with checkpoint.as_directory() as folder:
        trainer.load(safetensors.torch.load_file(Path(folder) / _STATE))


# --- rows ------------------------------------------------------------------------------------------------------------


class RowFiles(Mapping[int, Rows]):
    """Rows by shard, one file per shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: set[int] = set()
        folder.mkdir()

    def add(self, shard: int, rows: Rows) -> None:
        tensors = {"features": rows.features, "labels": rows.labels, "keys": rows.keys}
        safetensors.torch.save_file(tensors, self.folder / f"{shard}.safetensors")
        self.shards.add(shard)

    def __contains__(self, shard: object) -> bool:
        return shard in self.shards

    def __getitem__(self, shard: int) -> Rows:
        return Rows(**safetensors.torch.load_file(self.folder / f"{shard}.safetensors"))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.shards))

    def __len__(self) -> int:
        return len(self.shards)


def project(
    task: FitTask,
    folder: Path,
    device: torch.device,
    rank: int = 0,
    num_workers: int = 1,
    tell: Callable[[str], None] | None = None,
) -> WorkerRows:
    """Projects the shards of worker `rank` into files below `folder`, and returns a feed that reads them.

    `tell` gets what is done so far.
    """
    files = {part: RowFiles(folder / part.name) for part in (Part.TRAIN, Part.VALIDATION)}
    num_rows = torch.zeros(task.graded.store.num_shards, dtype=torch.long)
    for shard in range(rank, len(num_rows), num_workers):
        if tell is not None:
            tell(f"projecting shard {shard + 1:,} of {len(num_rows):,}")
        for part, rows in _projected(task, shard).items():
            files[part].add(shard, rows)
            if part is Part.TRAIN:
                num_rows[shard] = len(rows)
    num_rows = num_rows.to(device)
    if num_workers > 1:
        dist.all_reduce(num_rows)
    labels = torch.empty(0, len(task.weights), dtype=torch.float32)
    empty = Rows(torch.empty(0, task.num_features), labels, torch.empty(0, dtype=torch.int32))
    return WorkerRows(num_rows.tolist(), files[Part.TRAIN], files[Part.VALIDATION], empty, device)


def _projected(task: FitTask, shard: int) -> dict[Part, Rows]:
    graded = task.graded.rows(shard, task.projections)
    parts = task.graded.parts(graded.keys, task.split)
    low_keys = graded.keys.astype(np.uint32).view(np.int32)
    arrays = graded.features, graded.correct, low_keys
    return {
        part: Rows(*(torch.from_numpy(values[parts == part]) for values in arrays))
        for part in (Part.TRAIN, Part.VALIDATION)
    }
