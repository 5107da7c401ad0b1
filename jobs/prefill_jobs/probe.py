"""`probe`: d_eff and Fisher J of every layer and pooling, for every target, in one pass over the activation store."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from prefill_jobs import cluster
from prefill_jobs.graded import GradedStore
from prefill_router import probe, report, storage
from prefill_router.config import ProbeConfig
from prefill_router.moments import ClassMoments, Moments, class_moments
from prefill_router.probe import LayerProbe
from prefill_router.schema import ActivationColumn

TABLE = "probe.parquet"


def run_probe(config: ProbeConfig) -> list[LayerProbe]:
    """Probes a store and writes probe.parquet (the table), probe.json (the choices) and probe.svg (the plot)."""
    graded = GradedStore.open(config.activations, config.outcomes, config.pool, ignore_unknown=config.ignore_unknown)
    cluster.connect()
    probes = probe_store(graded)
    chosen = {target: column.name for target, column in probe.choose_columns(probes).items()}
    storage.write_bytes(storage.join(config.out, TABLE), storage.encode_parquet(to_table(probes)))
    storage.write_bytes(storage.join(config.out, "probe.svg"), report.to_svg(report.probe_figure(probes)).encode())
    summary = {"pool": graded.pool.name, "shrinkage": probe.SHRINKAGE, "columns": chosen}
    storage.write_json(storage.join(config.out, "probe.json"), summary)
    return probes


def probe_store(graded: GradedStore) -> list[LayerProbe]:
    """Every column's probes. A task takes one column of all shards, so the store is read once in all."""
    rows = cluster.map_rows(_items(graded.store.columns), _probe_column, fn_kwargs={"graded": graded})
    probes = [_from_row(probe) for row in rows for probe in json.loads(row["probes"])]
    return sorted(probes, key=lambda p: p.column)


def column_moments(graded: GradedStore, columns: Sequence[ActivationColumn]) -> dict[ActivationColumn, Moments]:
    """The moments of each column over the graded prompts."""
    rows = cluster.map_rows(_items(columns), _column_moments, fn_kwargs={"graded": graded})
    return {ActivationColumn.parse(r["column"]): Moments(r["count"], r["mean"], r["scatter"]) for r in rows}


def _items(columns: Sequence[ActivationColumn]) -> list[dict[str, str]]:
    return [{"column": column.name} for column in columns]


def _probe_column(item: dict[str, str], graded: GradedStore) -> dict[str, str]:
    column = ActivationColumn.parse(item["column"])
    moments: list[ClassMoments] = []
    for x, outcomes in graded.batches(column):
        part = class_moments(x, outcomes.correct)
        moments = [a.merge(b) for a, b in zip(moments, part, strict=True)] if moments else part
    probes = probe.probe_column(column, graded.pool.target_names, moments)
    return {"probes": json.dumps([_to_row(p) for p in probes])}


def _column_moments(item: dict[str, str], graded: GradedStore) -> dict[str, Any]:
    parts = (
        Moments.of(x[~np.isnan(outcomes.correct).all(1)])
        for x, outcomes in graded.batches(ActivationColumn.parse(item["column"]))
    )
    total = functools.reduce(Moments.merge, parts)
    return {**item, "count": total.count, "mean": total.mean, "scatter": total.scatter}


def _to_row(p: LayerProbe) -> dict[str, Any]:
    return {**asdict(p), "column": p.column.name}


def _from_row(row: dict[str, Any]) -> LayerProbe:
    return LayerProbe(**{**row, "column": ActivationColumn.parse(row["column"])})


def to_table(probes: Sequence[LayerProbe]) -> pa.Table:
    """The probes as a table; pooling and layer stand beside the column's name."""
    return pa.Table.from_pylist([{**_to_row(p), "pooling": p.column.pooling, "layer": p.column.layer} for p in probes])


def load_probes(uri: str) -> list[LayerProbe]:
    """The table that `probe` wrote below `uri`."""
    path = storage.join(uri, TABLE)
    storage.require(path, "probe table: run probe first")
    return [_from_row(row) for row in storage.read_table(path).drop_columns(["pooling", "layer"]).to_pylist()]
