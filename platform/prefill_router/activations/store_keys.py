"""The keys of an activation store's rows. Its ledger holds them, so that no prompt_id is read and hashed again."""

# N prompts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.commit_log import CommitLog
from prefill_router.corpus.split import Keys, prompt_hashes


@dataclass(frozen=True)
class StoreKeys:
    """In the store's order."""

    prompts: Keys  # (N,) hashes of the prompt_ids
    contents: Keys  # (N,) 64 bits of the prompts, or the same hashes where the ledger does not know a shard


def read(store: ActivationStore) -> StoreKeys:
    """Takes some requests a segment of the ledger, and, where it does not know a shard, some for that shard's ids.

    Raises UserError where the ledger, or a shard whose ids are wanted, is damaged.
    """
    ledger = CommitLog.open(store.uri)
    ends = np.cumsum(store.manifest.shards.table["rows"].to_numpy())
    prompts, contents = (np.empty(store.manifest.rows, np.uint64) for _ in range(2))

    def enter(shard: int, of_prompts: Keys, of_contents: Keys) -> None:
        rows = slice(ends[shard] - len(of_prompts), ends[shard])
        prompts[rows], contents[rows] = of_prompts, of_contents

    positions = _positions(store, ledger)
    num_unknown = int((positions < 0).sum())
    order = np.argsort(positions, kind="stable").tolist()
    unknown, known = order[:num_unknown], order[num_unknown:]
    for shard, (_, keys) in zip(known, ledger.keys(positions[known]), strict=True):
        enter(shard, keys[:, 0], keys[:, 1])
    hashes = storage.read_ahead(lambda shard: prompt_hashes(store.prompt_ids(shard).to_pylist()), unknown)
    for shard, of_prompts in zip(unknown, hashes, strict=True):
        enter(shard, of_prompts, of_prompts)
    return StoreKeys(prompts, contents)


def _positions(store: ActivationStore, ledger: CommitLog) -> NDArray[np.int64]:
    """Of each shard's record in the ledger; -1 where there is none of the same object."""
    listed = store.manifest.shards.table
    positions = ledger.positions(listed["file"].combine_chunks(), "file")
    known = np.flatnonzero(positions >= 0)
    recorded = ledger.records.select(["rows", "sha256"]).take(positions[known])
    listed = listed.take(known)
    is_same = pc.and_(*(pc.equal(recorded[name], listed[name]) for name in recorded.column_names))
    positions[known[~np.asarray(is_same, np.bool_)]] = -1
    return positions
