"""Runs jobs in this process, without Ray, by replacing the functions with which a job uses its cluster.

Values that would cross between Ray's processes are pickled here too. Only Ray's own part is missing: placement, retries
and killed workers, which tests with `local_ray` cover. An encoder is loaded once for all jobs of this process.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from prefill_jobs.collect.collector import CallActor
from prefill_jobs.extract import extractor
from prefill_jobs.runtime import cluster, ray_tasks, shared_objects
from prefill_jobs.train import train_job, trunk_fit
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.sensors import Sensor, load_sensor
from prefill_router.router import artifact

Row = dict[str, Any]
NUM_CPUS = 2


def copied(value: Any) -> Any:
    """The value as another process would receive it."""
    return cloudpickle.loads(cloudpickle.dumps(value))


class Rows:
    """The part of `ray.data.Dataset` that jobs use: lazily mapped rows."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def iter_rows(self) -> Iterator[Row]:
        yield from self._rows

    def map(
        self,
        function: Any,
        *,
        fn_kwargs: Mapping[str, Any] | None = None,
        fn_constructor_kwargs: Mapping[str, Any] | None = None,
        compute: Any = None,
        **_resources: Any,
    ) -> Rows:
        """Tasks run one by one. Calls of an actor overlap as in Ray."""
        function, arguments = copied(function), copied(dict(fn_kwargs or {}))
        if not isinstance(function, type):
            return Rows(copied(function(copied(row), **arguments)) for row in self._rows)
        actors = [function(**copied(dict(fn_constructor_kwargs or {}))) for _ in range(compute.max_size)]
        return Rows(self._called(actors, compute.max_concurrent_calls_per_actor))

    def _called(self, actors: Sequence[Callable[[Row], Row]], calls: int) -> Iterator[Row]:
        tasks = [(actors[i % len(actors)], row) for i, row in enumerate(self._rows)]
        try:
            if sequential.is_set:
                yield from (copied(actor(copied(row))) for actor, row in tasks)
                return
            with ThreadPoolExecutor(calls * len(actors)) as pool:
                yield from (copied(row) for row in pool.map(lambda task: task[0](copied(task[1])), tasks))
        finally:
            for actor in actors:
                _end(actor)

    def groupby(self, by: str, **_partitions: int) -> Groups:
        return Groups(self, by)


class Groups:
    """Rows grouped by a column."""

    def __init__(self, rows: Rows, by: str) -> None:
        self._rows, self._by = rows, by

    def map_groups(self, function: Any, **_resources: Any) -> Rows:
        function = copied(function)
        return Rows(row for group in self._columns() for row in _as_rows(copied(function(group))))

    def _columns(self) -> Iterator[dict[str, list[Any]]]:
        rows = sorted(self._rows.iter_rows(), key=lambda row: str(row[self._by]))
        for _, group in groupby(rows, key=lambda row: row[self._by]):
            members = list(group)
            yield {name: [row[name] for row in members] for name in members[0]}


def _end(actor: object) -> None:
    """Closes the connections and the event loop that would end with an actor's process."""
    actor = getattr(actor, "worker", None)  # of the actor that `ray_tasks` wraps
    if isinstance(actor, CallActor):
        asyncio.run_coroutine_threadsafe(actor._http.aclose(), actor._loop).result()
        actor._loop.call_soon_threadsafe(actor._loop.stop)
        while actor._loop.is_running():
            time.sleep(0.001)
        actor._loop.close()


def _as_rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


class Sequential:
    """Switch that makes an actor's calls run one after another, for tests that depend on the order."""

    is_set = False


sequential = Sequential()


class Shared:
    """Replaces `shared_objects.Shared`: all copies of a handle share one object."""

    _objects: dict[int, Any] = {}  # noqa: RUF012 - in place of an actor process

    def __init__(self, kind: type, *arguments: Any, **_: bool) -> None:
        self.number = len(self._objects)
        self._objects[self.number] = kind(*copied(arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        return copied(getattr(self._objects[self.number], method)(*copied(arguments)))

    async def call_async(self, method: str, *arguments: Any) -> Any:
        return self.call(method, *arguments)


def spread(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield copied(ray_tasks.attempt(copied(function), copied(item)).get())


def fit_here(task: trunk_fit.FitTask, workers: int, out: str, name: str) -> trunk_fit.Fit:
    """Fits a trunk as one worker of Ray Train does."""
    task, rates = copied(task), []
    trainer = task.trainer(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        feed = trunk_fit.project(task, Path(folder), torch.device("cpu"))
        trunk_fit.fit(feed, trainer, task.seed, rates.append)
    return trunk_fit.Fit(trainer.fitted(), rates[-1])


class Encoders:
    """Encoders of this process, loaded again once their files change: loading verifies them, which takes a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[list[tuple[Path, int]], Sensor]] = {}

    def load(self, spec: EncoderSpec) -> Sensor:
        files = [(file, file.stat().st_mtime_ns) for file in sorted(Path(spec.model).rglob("*"))]
        with self._lock:
            known, sensor = self._loaded.get(spec.model_dump_json(), (None, None))
            if sensor is None or files != known:
                sensor = load_sensor(spec)
                self._loaded[spec.model_dump_json()] = files, sensor
            return sensor


encoders = Encoders()


@contextmanager
def without_ray() -> Iterator[None]:
    """Makes jobs run in this process."""
    stand_ins = {
        "connect": lambda: None,
        "worker_id": lambda: "here",
        "nodes": lambda: ["here"],
        "_gpus_by_node": lambda: [0.0],
        "_total": lambda resource: float(NUM_CPUS) if resource == "CPU" else 0.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(cluster, name, stand_in)
        patch.setattr(shared_objects, "Shared", Shared)
        patch.setattr(ray_tasks, "spread", spread)
        patch.setattr(ray_tasks, "_dataset", lambda rows, _task_size=1: Rows(rows))
        patch.setattr(train_job, "fit_on_ray", fit_here)
        for module in (extractor, artifact):
            patch.setattr(module, "load_sensor", encoders.load)
        yield
