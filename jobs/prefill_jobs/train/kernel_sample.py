"""A sample of graded prompts with their features, on which a kernel machine is fitted."""

# N prompts, F features, T targets

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedRows, GradedStore
from prefill_jobs.runtime import cluster
from prefill_router.corpus.split import mixed
from prefill_router.probe.projection import Projection


def sample_rows(graded: GradedStore, projections: Sequence[Projection], max_rows: int) -> GradedRows:
    """The `max_rows` prompts of the lowest mixed hashes, in that order, or all. The shards' sizes do not matter."""
    keys = graded.graded_keys
    order = mixed(keys)
    below = np.partition(order, max_rows)[max_rows] if len(order) > max_rows else None
    arguments = {"graded": graded, "projections": list(projections), "below": below}
    items = [{"shard": shard} for shard in range(graded.store.num_shards)]
    parts = [row["rows"] for row in cluster.map_rows(items, _sample_shard, fn_kwargs=arguments)]
    rows = GradedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return _taken(rows, mixed(rows.keys).argsort())


def _sample_shard(
    item: dict[str, Any], graded: GradedStore, projections: list[Projection], below: np.uint64 | None
) -> dict[str, Any]:
    rows = graded.rows(int(item["shard"]), projections)
    return {"rows": tuple(rows if below is None else _taken(rows, mixed(rows.keys) < below))}


def _taken(rows: GradedRows, which: NDArray[Any]) -> GradedRows:
    return GradedRows(*(values[which] for values in rows))
