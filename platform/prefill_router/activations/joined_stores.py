"""Activation stores of different encoders over the same prompts, joined by prompt.

Reads as one store whose columns are named with their encoder. Its rows are those of the first store that every other
store has too, under the same id and with the same content.
"""

# N rows of the join, S rows of a shard, D hidden size

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.activations import store_keys
from prefill_router.activations.activation_store import ActivationStore, is_store
from prefill_router.activations.store_keys import StoreKeys
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderIdentity
from prefill_router.encoder.sensors import named
from prefill_router.storage import lease


@dataclass(frozen=True)
class JoinedStores:
    """Stores by the name of their encoder. Create it with `join`."""

    stores: dict[str, ActivationStore]
    rows: dict[str, NDArray[np.int64]]  # (N,) of each joined row, its row in each store

    @property
    def uri(self) -> str:
        return ",".join(store.uri for store in self.stores.values())

    @property
    def corpus(self) -> str:
        return self._first.corpus

    @property
    def is_sample(self) -> bool:
        """Whether the corpus may hold more prompts than the join."""
        num_rows = {len(next(iter(self.rows.values()))), *(store.num_rows for store in self.stores.values())}
        return len(num_rows) > 1 or any(store.is_sample for store in self.stores.values())

    @property
    def encoders(self) -> dict[str, EncoderIdentity]:
        return {name: store.manifest.encoder for name, store in self.stores.items()}

    @property
    def columns(self) -> list[ActivationColumn]:
        return [column.of(name) for name, store in self.stores.items() for column in store.columns]

    @property
    def content(self) -> str:
        """A text that changes with the stores' content."""
        return "\n".join(store.content for store in self.stores.values())

    def of(self, encoders: Mapping[str, EncoderIdentity]) -> JoinedStores:
        """These rows with the columns of `encoders` alone, under the given names.

        Raises UserError if an encoder has no store here.
        """
        by_fingerprint = {store.manifest.encoder.fingerprint: name for name, store in self.stores.items()}
        for identity in encoders.values():
            if identity.fingerprint not in by_fingerprint:
                raise UserError(
                    f"{self.uri}: has no activations of encoder {identity.spec.model} (fingerprint "
                    f"{identity.fingerprint}): add the store that it wrote"
                )
        names = {name: by_fingerprint[identity.fingerprint] for name, identity in encoders.items()}
        order = np.argsort(self.rows[next(iter(names.values()))])
        stores = {name: self.stores[own] for name, own in names.items()}
        return JoinedStores(stores, {name: self.rows[own][order] for name, own in names.items()})

    @property
    def num_shards(self) -> int:
        return self._first.num_shards

    def read(self, shard: int, columns: Sequence[ActivationColumn]) -> tuple[pa.Array, dict[str, NDArray[Any]]]:
        """Reads the joined rows of a shard of the first store: ids, `num_tokens` and `columns`.

        Raises UserError as `ActivationStore.read` does.
        """
        name = next(iter(self.stores))
        starts = self._first.shard_starts
        own = self.rows[name]
        which = slice(*np.searchsorted(own, starts[shard : shard + 2]))
        wanted = [column for column in columns if column.encoder == name]
        ids, encoded = self._first.read(shard, [column.unnamed for column in wanted])
        kept = own[which] - starts[shard]
        found = {NUM_TOKENS: encoded[NUM_TOKENS][kept]}
        found |= {column.name: encoded[column.unnamed.name][kept] for column in wanted}
        for other in list(self.stores)[1:]:
            if more := [column for column in columns if column.encoder == other]:
                found |= self._gather(other, self.rows[other][which], more)
        return ids.take(pa.array(kept)), found

    def _gather(
        self, name: str, rows: NDArray[np.int64], columns: Sequence[ActivationColumn]
    ) -> dict[str, NDArray[np.float16]]:
        """Columns (S, D) of rows of a store, wherever its shards have them."""
        store = self.stores[name]
        shards = np.searchsorted(store.shard_starts, rows, side="right") - 1
        width = store.manifest.encoder.hidden_size
        gathered = {column.name: np.empty((len(rows), width), np.float16) for column in columns}
        for shard in np.unique(shards).tolist():
            here = shards == shard
            _, values = store.read(shard, [column.unnamed for column in columns])
            for column in columns:
                gathered[column.name][here] = values[column.unnamed.name][rows[here] - store.shard_starts[shard]]
        return gathered

    @property
    def _first(self) -> ActivationStore:
        return next(iter(self.stores.values()))


def open_stores(activations: str) -> tuple[ActivationStore | JoinedStores, StoreKeys]:
    """Opens a store, several of them, separated by commas, or a folder that has a store for each encoder.

    Returns it with the keys of its rows. Raises UserError if a store is unfinished, or if stores cannot be joined.
    """
    stores = [ActivationStore.open(uri) for uri in store_uris(activations)]
    return (stores[0], store_keys.read(stores[0])) if len(stores) == 1 else join(stores)


def store_uris(activations: str) -> list[str]:
    """The stores of what `open_stores` takes."""
    return [store for uri in activations.split(",") for store in _stores_at(uri.strip())]


def store_below(folder: str, encoder: str) -> str:
    """The store of an encoder that was extracted to `folder`, given its name: `folder` itself for a single encoder."""
    return storage.join(folder, encoder) if encoder else folder


def has_own_store(uri: str) -> bool:
    """Whether a store, finished or not, is at `uri` itself, and not in folders below."""
    return is_store(uri) or lease.was_held(uri)


def _stores_at(uri: str) -> list[str]:
    if has_own_store(uri):
        return [uri]
    below = [storage.join(uri, name) for name in storage.list_names(uri)]
    return [folder for folder in below if has_own_store(folder)] or [uri]


def join(stores: Sequence[ActivationStore]) -> tuple[JoinedStores, StoreKeys]:
    """Joins stores, and says how many prompts of each are left out because another one lacks them.

    Raises UserError if two are of the same encoder, or if they share no prompt.
    """
    uris = ", ".join(store.uri for store in stores)
    for fingerprint, count in Counter(store.manifest.encoder.fingerprint for store in stores).items():
        if count > 1:
            raise UserError(f"{uris}: {count} stores are of one encoder ({fingerprint}): give one store per encoder")
    keys = [store_keys.read(store) for store in stores]
    found = np.stack([_places(keys[0], other) for other in keys])
    is_shared = (found >= 0).all(0)
    if not is_shared.any():
        raise UserError(f"{uris}: the stores share no prompt: extract one corpus with every encoder")
    for store in stores:
        if num_left_out := store.num_rows - int(is_shared.sum()):
            say(f"{store.uri}: {num_left_out:,} prompts are left out, because another encoder's store lacks them")
    names = named(store.manifest.encoder for store in stores)
    rows = dict(zip(names, found[:, is_shared], strict=True))
    joined = StoreKeys(keys[0].prompts[is_shared], keys[0].contents[is_shared])
    return JoinedStores(dict(zip(names, stores, strict=True)), rows), joined


def _places(keys: StoreKeys, other: StoreKeys) -> NDArray[np.int64]:
    """The row in `other` of each row (N,) of `keys`; -1 if its id is missing there, or has another content.

    Content that either store does not record counts as the same.
    """
    order = np.argsort(other.prompts)
    places = order[np.minimum(np.searchsorted(other.prompts, keys.prompts, sorter=order), len(order) - 1)]
    unrecorded = (keys.contents == keys.prompts) | (other.contents[places] == other.prompts[places])
    is_same = unrecorded | (other.contents[places] == keys.contents)
    return np.where((other.prompts[places] == keys.prompts) & is_same, places, -1)
