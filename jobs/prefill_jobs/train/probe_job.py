"""`probe`: computes d_eff and Fisher J of every layer, pooling and target, in one pass over the activation store."""

# N prompts, D hidden size

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.options import ProbeConfig
from prefill_jobs.runtime import cluster, ray_tasks
from prefill_jobs.runtime.progress import counted
from prefill_jobs.runtime.ray_tasks import Mergeable
from prefill_router import storage
from prefill_router.activations.joined_stores import store_uris
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.split import Part, Split
from prefill_router.corpus.split_groups import SplitGroups
from prefill_router.probe import layer_scores
from prefill_router.probe.layer_scores import LayerProbe
from prefill_router.probe.moments import LabelledMoments, Moments

TABLE = "probe.parquet"

M = TypeVar("M", bound=Mergeable)
R = TypeVar("R")

# Batches have at least this many times D rows, so that merging moments costs little compared with computing them.
_BATCH = 8


def run_probe(config: ProbeConfig, split: Split | None = None, groups: SplitGroups | None = None) -> list[LayerProbe]:
    """Probes one store per encoder and writes probe.parquet (the table), probe.json (the choices) and probe.svg.

    With a `split`, only outcomes of its training part are used; `groups` are its split groups.
    """
    from prefill_router.reports import figures  # imports matplotlib, which training does not need

    storage.check_output(config.out)
    stores = _open(config, groups)
    if split is not None:
        stores = [graded.only(split, Part.TRAIN) for graded in stores]
    cluster.connect()
    probes = [row for graded in stores for row in probe_store(graded)]
    storage.write_bytes(storage.join(config.out, TABLE), storage.encode_parquet(to_table(probes)))
    with doing("drawing the probe's figure"):
        svg = figures.to_svg(figures.probe_figure(probes))
    storage.write_bytes(storage.join(config.out, "probe.svg"), svg.encode())
    storage.write_json(storage.join(config.out, "probe.json"), _summary(stores[0].pool.name, probes))
    return probes


def _open(config: ProbeConfig, groups: SplitGroups | None) -> list[GradedStore]:
    """Opens the stores. Raises UserError if one encoder wrote two of them."""
    stores = [
        GradedStore.open(
            uri,
            config.outcomes,
            config.pool,
            ignore_unknown=config.ignore_unknown,
            groups=groups,
            correct_at=config.correct_at,
        )
        for uri in store_uris(config.activations)
    ]
    for name, count in Counter(map(_encoder, stores)).items():
        if count > 1:
            raise UserError(f"{config.activations}: {count} stores are from encoder {name}: give one store per encoder")
    sizes = {_encoder(graded): len(graded.graded_keys) for graded in stores}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{size:,} by {name}" for name, size in sizes.items())
        say(f"probe: the stores have different numbers of graded prompts: {counts}")
    return stores


def _encoder(graded: GradedStore, column: ActivationColumn | None = None) -> str:
    return graded.store.encoders[column.encoder if column else ""].spec.model


def _summary(pool: str, probes: Sequence[LayerProbe]) -> dict[str, Any]:
    """The choices: each target's encoder and column, and each encoder's joint set of columns for the pool."""
    chosen = layer_scores.choose(probes)
    return {
        "pool": pool,
        "shrinkage": layer_scores.SHRINKAGE,
        "columns": {target: row.column.name for target, row in chosen.items()},
        "encoders": {target: row.encoder for target, row in chosen.items()},
        "joint_columns": {
            encoder: [column.name for column in layer_scores.joint_columns(rows)]
            for encoder, rows in layer_scores.by_encoder(probes).items()
        },
    }


# --- the pass over a store ----------------------------------------------------------------------------------------


def probe_store(graded: GradedStore) -> list[LayerProbe]:
    """Probes every column of a store, and returns the probes sorted by column."""
    found = _by_column(graded, graded.store.columns, _labelled_moments, _probes)
    return sorted((probe for probes in found for probe in probes), key=lambda probe: probe.column)


def column_moments(graded: GradedStore, columns: Sequence[ActivationColumn]) -> dict[ActivationColumn, Moments]:
    """The moments of each column over the graded prompts."""
    return dict(_by_column(graded, columns, _moments, _named))


class ColumnPart(NamedTuple):
    """One column of some shards."""

    column: ActivationColumn
    shards: range


def _by_column(
    graded: GradedStore,
    columns: Sequence[ActivationColumn],
    function: Callable[[GradedStore, ColumnPart], M],
    finish: Callable[[GradedStore, str, M], R],
) -> Iterator[R]:
    """Runs a task per column over all shards; with more CPUs than columns, several tasks per column, then merges."""
    slices = min(graded.store.num_shards, ceil(cluster.num_cpus() / len(columns)))
    cuts = np.linspace(0, graded.store.num_shards, slices + 1).astype(int).tolist()
    parts = [ColumnPart(column, range(start, stop)) for column in columns for start, stop in itertools.pairwise(cuts)]
    items = [(part.column.name, part) for part in parts]
    functions = functools.partial(function, graded), functools.partial(finish, graded)
    found = ray_tasks.merge_items(items, *functions, **cluster.task_resources())
    return counted(found, "probe", len(columns), "columns")


def _labelled_moments(graded: GradedStore, part: ColumnPart) -> LabelledMoments:
    device = _task_device()
    parts = (LabelledMoments.of(x, correct, keys, device) for x, correct, keys in _batches(graded, part))
    return functools.reduce(LabelledMoments.merge, parts).to(torch.device("cpu"))


def _moments(graded: GradedStore, part: ColumnPart) -> Moments:
    device = _task_device()
    parts = (Moments.of(x[~np.isnan(correct).all(1)], device) for x, correct, _ in _batches(graded, part))
    return functools.reduce(Moments.merge, parts).to(torch.device("cpu"))


def _batches(graded: GradedStore, part: ColumnPart) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yields activations, correctness by target and prompt hashes of some shards, in batches."""
    shards = graded.batches(part.column, part.shards)
    least = _BATCH * graded.store.encoders[part.column.encoder].hidden_size
    held: list[tuple[NDArray[Any], ...]] = []
    for shard in shards:
        held.append(shard)
        if sum(len(x) for x, *_ in held) >= least:
            yield tuple(map(np.concatenate, zip(*held, strict=True)))
            held = []
    if held:
        yield tuple(map(np.concatenate, zip(*held, strict=True)))


def _probes(graded: GradedStore, column: str, moments: LabelledMoments) -> list[LayerProbe]:
    moments, parsed = moments.to(_task_device()), ActivationColumn.parse(column)
    return layer_scores.probe_column(_encoder(graded, parsed), parsed, graded.pool.target_names, moments)


def _named(_graded: GradedStore, column: str, moments: Moments) -> tuple[ActivationColumn, Moments]:
    return ActivationColumn.parse(column), moments


def _task_device() -> torch.device:
    """The device of a task. On CPUs it uses one thread, because there is one task per core."""
    torch.set_num_threads(1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- the table ------------------------------------------------------------------------------------------------------


def to_table(probes: Sequence[LayerProbe]) -> pa.Table:
    """The probes as a table, with pooling and layer as columns of their own."""
    return pa.Table.from_pylist(
        [{**asdict(p), "column": p.column.name, "pooling": p.column.pooling, "layer": p.column.layer} for p in probes]
    )


def load_probes(uri: str) -> list[LayerProbe]:
    """Loads the table that `probe` wrote to `uri`."""
    path = storage.join(uri, TABLE)
    storage.require(path, "probe table: run probe first")
    rows = storage.read_table(path).drop_columns(["pooling", "layer"]).to_pylist()
    return [LayerProbe(**{**row, "column": ActivationColumn.parse(row["column"])}) for row in rows]
