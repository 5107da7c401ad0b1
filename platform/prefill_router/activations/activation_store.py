"""The activation store: Parquet shards of pooled hidden states, and the manifest that commits them.

Readers only use what the manifest lists: a store without a manifest is unfinished, whatever files it has.
"""

# N prompts, D hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.activations.shard_list import ShardList
from prefill_router.common import validation
from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, PROMPT_ID, ActivationColumn, activations
from prefill_router.encoder.encoder_spec import EncoderIdentity, check_same
from prefill_router.storage import parquet_objects
from prefill_router.storage.parquet_objects import ShardFile

_LISTS = "shards"  # the folder of shard lists that are too long for the manifest
MAX_LISTED = 10_000  # number of shards that the manifest itself lists, in 3 MB


class StoreManifest(validation.StrictModel):
    """The content of manifest.json."""

    format: Literal[1] = 1
    encoder: EncoderIdentity
    columns: list[str]
    corpus: str
    is_sample: bool  # extracted with --limit: the corpus may hold more prompts
    shards: ShardList
    quarantine: ShardFile | None = None  # the invalid rows, with the reasons

    @property
    def rows(self) -> int:
        return self.shards.total("rows")


def to_table(prompt_ids: Sequence[str], encoded: Mapping[str, NDArray[Any]]) -> pa.Table:
    """Converts the result of `PrefillEncoder.encode` to a table of the store."""
    columns = [ActivationColumn.parse(name) for name in encoded if name != NUM_TOKENS]
    hidden_size = encoded[columns[0].name].shape[1]
    schema = activations(columns, hidden_size)
    arrays: list[pa.Array] = [pa.array(prompt_ids, pa.string()), pa.array(encoded[NUM_TOKENS], pa.int32())]
    for column in columns:
        values = pa.array(encoded[column.name].reshape(-1), pa.float16())
        arrays.append(pa.FixedSizeListArray.from_arrays(values, type=schema.field(column.name).type))
    return pa.table(arrays, schema=schema)


def from_table(table: pa.Table) -> dict[str, NDArray[Any]]:
    """The inverse of `to_table`: (n, D) float16 for each activation column, and `num_tokens` (n,) int32."""
    encoded: dict[str, NDArray[Any]] = {}
    for field in table.schema:
        if pa.types.is_fixed_size_list(field.type):
            values = table[field.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            encoded[field.name] = values.reshape(len(table), field.type.list_size)
    encoded[NUM_TOKENS] = np.asarray(table[NUM_TOKENS], np.int32)
    return encoded


def write_manifest(uri: str, manifest: StoreManifest) -> None:
    """Commits a store, which makes it visible to readers. A long list of shards goes to a file of its own first."""
    file = None
    if len(manifest.shards) > MAX_LISTED:
        file = parquet_objects.write_addressed(uri, _LISTS, manifest.shards.table)
    listed = manifest.model_dump()["shards"] if file is None else file.model_dump()
    header = manifest.model_dump(exclude={"shards"})
    storage.write_json(storage.join(uri, parquet_objects.MANIFEST), {**header, "shards": listed})
    _remove_lists(uri, keep=file)


def is_store(uri: str) -> bool:
    """Whether there is a finished extraction at `uri`."""
    return storage.exists(storage.join(uri, parquet_objects.MANIFEST))


def read_manifest(uri: str) -> StoreManifest | None:
    """Reads the manifest of a store; None if there is no finished extraction."""
    if not is_store(uri):
        return None
    path = storage.join(uri, parquet_objects.MANIFEST)
    content = storage.read_json(path)
    if isinstance(content, dict) and isinstance(content.get("shards"), dict):
        file = validation.validate(ShardFile, content["shards"], path)
        content["shards"] = ShardList(parquet_objects.read_addressed(uri, file))
    return validation.validate(StoreManifest, content, path)


def remove_manifest(uri: str) -> None:
    """Deletes the manifest, which makes a store unfinished."""
    storage.remove(storage.join(uri, parquet_objects.MANIFEST))
    _remove_lists(uri, keep=None)


def _remove_lists(uri: str, keep: ShardFile | None) -> None:
    folder = storage.join(uri, _LISTS)
    paths = [storage.join(folder, name) for name in storage.list_names(folder)]
    storage.remove_many([path for path in paths if keep is None or path != storage.join(uri, keep.name)])


@dataclass(frozen=True)
class ActivationStore:
    """A finished extraction. Create it with `ActivationStore.open`."""

    uri: str
    manifest: StoreManifest

    @classmethod
    def open(cls, uri: str) -> ActivationStore:
        """Opens the store at `uri`. Raises UserError if there is no finished extraction."""
        manifest = read_manifest(uri)
        if manifest is None:
            raise UserError(
                f"{uri}: no finished extraction here ({parquet_objects.MANIFEST} is missing): run extract first"
            )
        return cls(uri, manifest)

    @property
    def corpus(self) -> str:
        return self.manifest.corpus

    @property
    def is_sample(self) -> bool:
        """Whether the corpus may hold more prompts."""
        return self.manifest.is_sample

    @property
    def num_rows(self) -> int:
        return self.manifest.rows

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """The first row of each shard, and the number of rows."""
        return np.concatenate([[0], np.cumsum(self.manifest.shards.table["rows"].to_numpy())]).astype(np.int64)

    @property
    def content(self) -> str:
        """A text that changes with the store's content."""
        return self.manifest.model_dump_json()

    @property
    def encoders(self) -> dict[str, EncoderIdentity]:
        """The encoders by the names in the columns: a store has one, without a name."""
        return {"": self.manifest.encoder}

    def of(self, encoders: Mapping[str, EncoderIdentity]) -> ActivationStore:
        """This store, if it has the activations of exactly these encoders. Raises UserError if it does not."""
        for identity in encoders.values():
            check_same(identity, self.manifest.encoder.fingerprint, self.uri)
        return self

    @property
    def columns(self) -> list[ActivationColumn]:
        return [ActivationColumn.parse(name) for name in self.manifest.columns]

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    def prompt_ids(self, shard: int | None = None) -> pa.Array:
        """The ids of one shard or of the whole store, in order."""
        indices = range(self.num_shards) if shard is None else [shard]
        parts = [self._read(i, [PROMPT_ID])[PROMPT_ID].combine_chunks() for i in indices]
        return pa.concat_arrays(parts)

    def read(self, shard: int, columns: Sequence[ActivationColumn]) -> tuple[pa.Array, dict[str, NDArray[Any]]]:
        """Reads a shard: its ids, and the result of `PrefillEncoder.encode` for them with only `columns`.

        Raises UserError if a column was not extracted, or if the shard does not match the manifest.
        """
        missing = [column.name for column in columns if column.name not in self.manifest.columns]
        if missing:
            raise UserError(f"{self.uri}: has no column {missing[0]}: extract that layer and pooling too")
        table = self._read(shard, [PROMPT_ID, NUM_TOKENS, *(column.name for column in columns)])
        width = self.manifest.encoder.hidden_size
        for column in columns:
            kind = table[column.name].type
            if not pa.types.is_fixed_size_list(kind) or kind.list_size != width:
                path = storage.join(self.uri, self.manifest.shards[shard].file.name)
                raise UserError(
                    f"{path}: column {column.name} is {kind}, must be vectors of {width} "
                    f"according to {parquet_objects.MANIFEST}: remove {self.uri} and run extract again"
                )
        return table[PROMPT_ID].combine_chunks(), from_table(table)

    def _read(self, shard: int, columns: Sequence[str]) -> pa.Table:
        return parquet_objects.read_shard(self.uri, self.manifest.shards[shard].file, columns)
