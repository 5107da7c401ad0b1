"""A router's estimates of a corpus. Each prompt is read once over all runs, and its estimates are kept."""

# N rows of the corpus, M estimates

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.extract.encoder_actor import map_on_encoders
from prefill_jobs.label.estimator import EstimateTask, ShardEstimator
from prefill_jobs.runtime import cluster, ray_tasks
from prefill_jobs.runtime.capacity import Capacity
from prefill_jobs.runtime.progress import Progress
from prefill_router import storage
from prefill_router.activations.commit_log import CommitLog
from prefill_router.activations.joined_stores import store_below
from prefill_router.activations.reuse import Sources
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.common.console import doing
from prefill_router.corpus.plan import CorpusPlan
from prefill_router.corpus.reader import MAX_PROMPT_BYTES
from prefill_router.encoder import checkpoint
from prefill_router.query_log.estimates import ContentIndex, Contents, contents_of
from prefill_router.router.artifact import Router
from prefill_router.storage.lease import Lease

_READERS = 32


@dataclass(frozen=True)
class Estimation:
    """Estimates a corpus with a router, and keeps the estimates at `out`."""

    router: Router | BaselineRouter
    router_uri: str
    out: str  # has estimates of this router only
    actors: cluster.Actors = field(default_factory=cluster.Actors)
    max_prompt_bytes: int = MAX_PROMPT_BYTES
    activations: str | None = None  # a store, or a folder of one per encoder, whose activations are reused

    def check(self) -> None:
        """Raises UserError if the encoder cannot be loaded, unless existing estimates may make it unnecessary."""
        if not storage.list_names(self.out):
            self.router.require_encoders()

    def run(self, planned: CorpusPlan, lease: Lease, task: str) -> int:
        """Estimates the prompts that no run has estimated, and returns how many the encoders read.

        `task` names the work in progress lines.
        """
        contents = planned.keys[:, 1:]
        known = KeptEstimates.read(self.out).index.find(contents) >= 0
        wanted = planned.is_first
        progress = Progress(task, int(wanted.sum()), at_once=self.actors.number)
        progress.skip(int((wanted & known).sum()))
        tasks = self._tasks(planned, wanted & ~known)
        if not tasks:
            return 0
        if isinstance(self.router, Router):
            # Downloads before the actors start, so that no actor occupies a GPU meanwhile.
            for identity in self.router.encoders.values():
                ray_tasks.run_on_every_node(checkpoint.fetch, identity.spec.model, identity.spec.revision)
        uri = storage.absolute(self.router_uri)
        create = partial(ShardEstimator, uri, self.out, self.activations, self.max_prompt_bytes)
        capacity, num_read = Capacity(), 0
        with progress.shown():
            for done in map_on_encoders(create, tasks, self.actors, progress):
                lease.check()
                capacity.add(done.effort)
                num_read += done.effort.work.prompts
                progress.add(done.num_prompts, done.effort.work, capacity, done.effort.num_retries)
                progress.quarantine(done.num_refused)
        return num_read

    def _tasks(self, planned: CorpusPlan, wanted: NDArray[np.bool_]) -> list[EstimateTask]:
        """A task per shard with wanted rows (N,), with the stores' shards that have some of their activations."""
        sources = self._sources([shard.digest for shard in planned.shards])
        tasks = []
        for i, (shard, span) in enumerate(planned.spans()):
            rows = np.flatnonzero(wanted[span])
            if len(rows):
                keys = planned.keys[span][rows]
                tasks.append(EstimateTask(shard, rows, {name: found.of(i, keys) for name, found in sources.items()}))
        return tasks

    def _sources(self, digests: list[str]) -> dict[str, Sources]:
        """The stores' shards, by encoder."""
        if self.activations is None:
            return {}
        assert isinstance(self.router, Router)
        stores = {name: store_below(self.activations, name) for name in self.router.encoders}
        return {name: Sources(CommitLog.open(store), digests) for name, store in stores.items()}


@dataclass(frozen=True)
class KeptEstimates:
    """The contents of the prompts that have kept estimates, and the file of each."""

    names: list[str]  # of the files
    contents: Contents  # (M, 2)
    owners: NDArray[np.int64]  # (M,) index of the file in `names`, ascending

    @classmethod
    @doing("reading the kept estimates")
    def read(cls, uri: str) -> KeptEstimates:
        names = [name for name in storage.list_names(uri) if name.endswith(".parquet")]

        def contents(name: str) -> Contents:
            return contents_of(storage.read_table(storage.join(uri, name), ["content"])["content"].to_pylist())

        with ThreadPoolExecutor(_READERS) as readers:
            parts = list(readers.map(contents, names))
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return cls(names, np.concatenate([np.zeros((0, 2), np.uint64), *parts]), owners)

    @cached_property
    def index(self) -> ContentIndex:
        return ContentIndex(self.contents)

    def names_of(self, places: NDArray[np.int64]) -> tuple[str, ...]:
        """The files with the estimates at these indices."""
        return tuple(self.names[i] for i in np.unique(self.owners[places]))

    def by_object(self, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Splits values (M,) of the estimates by file."""
        ends = np.searchsorted(self.owners, np.arange(1, len(self.names)))
        return dict(zip(self.names, np.split(values, ends), strict=True))
