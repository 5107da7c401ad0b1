"""The keys of an activation store's rows, read from its commit log, which is faster than hashing each prompt_id."""

# N prompts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.commit_log import CommitLog
from prefill_router.corpus.split import PromptHashes, prompt_hashes


@dataclass(frozen=True)
class StoreKeys:
    """Keys in the order of the store's rows."""

    prompts: PromptHashes  # (N,) hashes of the prompt_ids
    contents: (
        PromptHashes  # (N,) 64 bits of the prompts; for shards that are not in the log, the hashes of the prompt_ids
    )


def read(store: ActivationStore) -> StoreKeys:
    """Reads the keys with a few requests per segment of the commit log, and a few per shard that is not in it.

    Raises UserError if the log, or a shard whose ids are read, is damaged.
    """
    log = CommitLog.open(store.uri)
    ends = np.cumsum(store.manifest.shards.table["rows"].to_numpy())
    prompts, contents = (np.empty(store.manifest.rows, np.uint64) for _ in range(2))

    def enter(shard: int, of_prompts: PromptHashes, of_contents: PromptHashes) -> None:
        rows = slice(ends[shard] - len(of_prompts), ends[shard])
        prompts[rows], contents[rows] = of_prompts, of_contents

    positions = _positions(store, log)
    num_unknown = int((positions < 0).sum())
    order = np.argsort(positions, kind="stable").tolist()
    unknown, known = order[:num_unknown], order[num_unknown:]
    for shard, (_, keys) in zip(known, log.keys(positions[known]), strict=True):
        enter(shard, keys[:, 0], keys[:, 1])
    hashes = storage.read_ahead(lambda shard: prompt_hashes(store.prompt_ids(shard).to_pylist()), unknown)
    for shard, of_prompts in zip(unknown, hashes, strict=True):
        enter(shard, of_prompts, of_prompts)
    return StoreKeys(prompts, contents)


def _positions(store: ActivationStore, log: CommitLog) -> NDArray[np.int64]:
    """The position of each shard's record in the log; -1 if there is none, or if it describes another file."""
    listed = store.manifest.shards.table
    positions = log.positions(listed["file"].combine_chunks(), "file")
    known = np.flatnonzero(positions >= 0)
    recorded = log.records.select(["rows", "sha256"]).take(positions[known])
    listed = listed.take(known)
    is_same = pc.and_(*(pc.equal(recorded[name], listed[name]) for name in recorded.column_names))
    positions[known[~np.asarray(is_same, np.bool_)]] = -1
    return positions
