"""The activation store: Parquet shards of pooled hidden states, and the manifest that commits them.

Readers trust the manifest alone: a store without one is unfinished, whatever objects lie there.
"""

# N prompts, D hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_router import config, shards, storage
from prefill_router.encoder import EncoderIdentity
from prefill_router.errors import UserError
from prefill_router.schema import NUM_TOKENS, PROMPT_ID, ActivationColumn, activations


class ActivationShard(config.StrictModel):
    """A committed shard and what the encoder saw in it."""

    file: shards.ShardFile
    num_tokens: int
    num_truncated: int  # prompts that were cut to max_tokens


class Manifest(config.StrictModel):
    format: Literal[1] = 1
    encoder: EncoderIdentity
    columns: list[str]
    corpus: str
    is_sample: bool  # extracted with --limit: the corpus may hold more prompts
    shards: list[ActivationShard]

    @property
    def rows(self) -> int:
        return sum(shard.file.rows for shard in self.shards)


def write_activations(
    uri: str, index: int, prompt_ids: Sequence[str], encoded: Mapping[str, NDArray[Any]], num_truncated: int
) -> ActivationShard:
    """Writes one shard of what `PrefillEncoder.encode` returned."""
    columns = [ActivationColumn.parse(name) for name in encoded if name != NUM_TOKENS]
    hidden_size = encoded[columns[0].name].shape[1]
    schema = activations(columns, hidden_size)
    arrays: list[pa.Array] = [pa.array(prompt_ids, pa.string()), pa.array(encoded[NUM_TOKENS], pa.int32())]
    for column in columns:
        values = pa.array(encoded[column.name].reshape(-1), pa.float16())
        arrays.append(pa.FixedSizeListArray.from_arrays(values, type=schema.field(column.name).type))
    file = shards.write_shard(uri, index, pa.table(arrays, schema=schema))
    return ActivationShard(file=file, num_tokens=int(encoded[NUM_TOKENS].sum()), num_truncated=num_truncated)


def write_manifest(uri: str, manifest: Manifest) -> None:
    storage.write_json(storage.join(uri, shards.MANIFEST), manifest.model_dump())


@dataclass(frozen=True)
class ActivationStore:
    """A finished extraction. Make one with `ActivationStore.open`."""

    uri: str
    manifest: Manifest

    @classmethod
    def open(cls, uri: str) -> ActivationStore:
        """Raises UserError where no finished extraction lies at `uri`."""
        path = storage.join(uri, shards.MANIFEST)
        if not storage.exists(path):
            raise UserError(
                f"{uri}: no finished extraction lies here ({shards.MANIFEST} is missing): run extract first"
            )
        return cls(uri, config.validate(Manifest, storage.read_json(path), path))

    @property
    def columns(self) -> list[ActivationColumn]:
        return [ActivationColumn.parse(name) for name in self.manifest.columns]

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    def prompt_ids(self, shard: int | None = None) -> pa.Array:
        """The ids of one shard, or of the whole store, in its order."""
        indices = range(self.num_shards) if shard is None else [shard]
        parts = [self._read(i, [PROMPT_ID])[PROMPT_ID].combine_chunks() for i in indices]
        return pa.concat_arrays(parts)

    def read(self, shard: int, columns: Sequence[ActivationColumn]) -> tuple[pa.Array, dict[str, NDArray[Any]]]:
        """The ids of one shard, and what `PrefillEncoder.encode` returned for them, of `columns` alone."""
        missing = [column.name for column in columns if column.name not in self.manifest.columns]
        if missing:
            raise UserError(f"{self.uri}: has no column {missing[0]}: extract that layer and pooling too")
        table = self._read(shard, [PROMPT_ID, NUM_TOKENS, *(column.name for column in columns)]).combine_chunks()
        encoded: dict[str, NDArray[Any]] = {}
        for column in columns:
            values = table[column.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            encoded[column.name] = values.reshape(len(table), self.manifest.encoder.hidden_size)
        encoded[NUM_TOKENS] = np.asarray(table[NUM_TOKENS], np.int32)
        return table[PROMPT_ID].combine_chunks(), encoded

    def _read(self, shard: int, columns: Sequence[str]) -> pa.Table:
        return shards.read_shard(self.uri, self.manifest.shards[shard].file, columns)
