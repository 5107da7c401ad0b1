"""A sample of graded prompts with their features, on which a kernel machine is fitted."""

# N prompts, F features, T targets

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedRows, GradedStore
from prefill_jobs.runtime import ray_tasks
from prefill_jobs.runtime.progress import counted
from prefill_router.corpus.split import mixed
from prefill_router.probe.projection import Projection


def sample_rows(graded: GradedStore, projections: Sequence[Projection], max_rows: int) -> GradedRows:
    """The `max_rows` prompts of the lowest mixed hashes, in that order, or all. The shards' sizes do not matter."""
    keys = graded.graded_keys
    order = mixed(keys)
    below = np.partition(order, max_rows)[max_rows] if len(order) > max_rows else None
    task = partial(_sample_shard, graded=graded, projections=projections, below=below)
    num_shards = graded.store.num_shards
    parts = list(counted(ray_tasks.map_items(task, range(num_shards)), "read features", num_shards, "shards"))
    rows = GradedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return _taken(rows, mixed(rows.keys).argsort())


def _sample_shard(
    shard: int, graded: GradedStore, projections: Sequence[Projection], below: np.uint64 | None
) -> GradedRows:
    rows = graded.rows(shard, projections)
    return rows if below is None else _taken(rows, mixed(rows.keys) < below)


def _taken(rows: GradedRows, which: NDArray[Any]) -> GradedRows:
    return GradedRows(*(values[which] for values in rows))
