"""Base of the actors that read prompts with encoders: loading, measuring, retries and fault tolerance."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TypeVar

import torch

from prefill_jobs.extract.guarded_encoder import GuardedEncoder
from prefill_jobs.extract.shard_attempts import ShardAttempts
from prefill_jobs.runtime import cluster, ray_tasks, shared_objects
from prefill_jobs.runtime.capacity import Effort
from prefill_jobs.runtime.progress import Progress
from prefill_jobs.runtime.worker_notes import WorkerNote
from prefill_router.common.errors import UserError
from prefill_router.encoder.hardware import measured_peak_flops
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.sensors import Sensor

_CALLS = 3  # concurrent shards per actor: one is read, one is in the encoder, one is written
_MAX_ATTEMPTS = 20  # at a shard; then the job fails

T = TypeVar("T")
R = TypeVar("R")


class EncoderActor(ABC):
    """Calls overlap: while one shard is in the encoder, the next one is read and the previous one is written."""

    def __init__(self, threads: int, attempts: shared_objects.Shared, note: WorkerNote) -> None:
        self.threads = min(threads, os.cpu_count() or 1)
        self.attempts, self.note = attempts, note
        self.worker = cluster.worker_id()
        self._loading = threading.Lock()

    @property
    @abstractmethod
    def sensors(self) -> Mapping[str, Sensor]:
        """The encoders by name, which are loaded on first use."""

    @cached_property
    def guarded_encoders(self) -> dict[str, GuardedEncoder]:
        return {name: GuardedEncoder(sensor, self.threads) for name, sensor in self.sensors.items()}

    @cached_property
    def peak_flops(self) -> float:
        """The measured peak per second of all GPUs that the encoders are on."""
        dtypes = {device: sensor.dtype for sensor in self.sensors.values() for device in sensor.devices}
        return sum(measured_peak_flops(device, dtype) for device, dtype in dtypes.items())

    @cached_property
    def began_s(self) -> float:
        """Start time of the first task."""
        return time.monotonic()

    def begin(self, digest: str) -> int:
        """Starts a task on a shard and returns the number of the attempt, from 1.

        Raises UserError after too many attempts.
        """
        _ = self.began_s
        torch.set_num_threads(self.threads)  # applies to the calling thread
        attempt: int = self.attempts.call("begin", digest)
        if attempt > _MAX_ATTEMPTS:
            raise UserError(f"workers crashed {attempt - 1} times on one shard: find the cause in Ray's worker logs")
        return attempt

    def load_encoders(self) -> None:
        """Loads the encoders and measures their peak while no other task runs."""
        with self._loading:
            if "peak_flops" in self.__dict__:
                return
            self.note.write("loading the encoder")
            _ = self.guarded_encoders
            self.note.write("measuring the peak of the hardware")
            _ = self.peak_flops
            self.note.write("reading the first prompts")

    def effort(self, work: Work, attempt: int) -> Effort:
        """Reports a finished task."""
        peak_flops = self.peak_flops if work.prompts else 0.0
        return Effort(work, self.worker, peak_flops, time.monotonic() - self.began_s, attempt - 1)


def map_on_encoders(
    create: Callable[..., Callable[[T], R]], tasks: Sequence[T], actors: cluster.Actors, progress: Progress
) -> Iterator[R]:
    """Runs tasks on encoder actors, which `create` builds given `threads`, `attempts` and a `note` for `progress`."""
    attempts, note = shared_objects.Shared(ShardAttempts), WorkerNote()
    progress.start = lambda: note.read() or "starting workers"
    build = partial(create, threads=cluster.threads_per_worker(actors.number), attempts=attempts, note=note)
    yield from ray_tasks.map_on_actors(build, tasks, **actors.options(_CALLS))
    note.remove()
