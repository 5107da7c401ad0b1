"""A made-up activation store with outcomes, of any size: a few hidden traits of a prompt decide who answers it."""

# N prompts, D hidden size, R traits, T targets

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefill_router.activations.activation_store import StoreManifest, to_table, write_manifest
from prefill_router.activations.shard_list import ActivationShard
from prefill_router.common.schema import OUTCOMES, ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.storage import parquet_objects

COLUMNS = [ActivationColumn("last", 1), ActivationColumn("mean", 1)]
TARGETS = ["small", "medium", "large", "huge"]
_TRAITS = 8
_SHARD_ROWS = 2048


def write_store(folder: Path, num_rows: int, hidden_size: int) -> None:
    """Activations, outcomes.parquet (5 % missing) and pool.toml below `folder`, a shard at a time."""
    files = []
    folder.mkdir(parents=True)
    with pq.ParquetWriter(folder / "outcomes.parquet", OUTCOMES) as writer:
        for index, start in enumerate(range(0, num_rows, _SHARD_ROWS)):
            rng = np.random.default_rng(index)
            count = min(_SHARD_ROWS, num_rows - start)
            ids = [f"p{start + i:09d}" for i in range(count)]
            traits = rng.normal(size=(count, _TRAITS))
            encoded = {column.name: _activations(traits, hidden_size, rng) for column in COLUMNS}
            table = to_table(ids, encoded | {"num_tokens": rng.integers(20, 400, count).astype(np.int32)})
            file = parquet_objects.write_shard(str(folder / "activations"), index, table)
            files.append(ActivationShard(file=file, num_tokens=0, num_truncated=0))
            writer.write_table(_outcomes(ids, traits, rng))
    identity = EncoderIdentity(
        spec=EncoderSpec(model="synthetic"), num_layers=1, hidden_size=hidden_size, fingerprint="synthetic"
    )
    columns = [column.name for column in COLUMNS]
    write_manifest(
        str(folder / "activations"),
        StoreManifest(encoder=identity, columns=columns, corpus="synthetic", is_sample=False, shards=files),
    )
    prices = "\n".join(
        f'[[pool]]\nname = "{target}"\ninput_price = {4.0**i}\noutput_price = {4.0 ** (i + 1)}'
        for i, target in enumerate(TARGETS)
    )
    (folder / "pool.toml").write_text(prices)


def _activations(traits_NR: NDArray[np.float64], hidden_size: int, rng: np.random.Generator) -> NDArray[np.float16]:
    mixing = np.random.default_rng(0).normal(size=(_TRAITS, hidden_size))
    noise = rng.normal(size=(len(traits_NR), hidden_size))
    return (np.tanh(traits_NR @ mixing) + noise).astype(np.float16)


def _outcomes(ids: list[str], traits_NR: NDArray[np.float64], rng: np.random.Generator) -> pa.Table:
    difficulty = traits_NR[:, 0] + traits_NR[:, 1] * traits_NR[:, 2]
    tables = []
    for t, target in enumerate(TARGETS):
        logits = t - 1.5 - difficulty + 0.7 * traits_NR[:, 3 + t]
        correct = rng.random(len(ids)) < 1.0 / (1.0 + np.exp(-logits))
        tokens = rng.lognormal(4.0 + 0.3 * difficulty + 0.2 * t, 0.4).astype(np.int32)
        graded = np.flatnonzero(rng.random(len(ids)) > 0.05)
        columns = [pa.array(ids).take(pa.array(graded)), pa.array([target] * len(graded))]
        columns += [
            pa.array(correct[graded], pa.float32()),
            pa.array(tokens[graded]),
            pa.nulls(len(graded), pa.float64()),
        ]
        tables.append(pa.table(columns, schema=OUTCOMES))
    return pa.concat_tables(tables)
