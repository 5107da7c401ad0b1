"""Which finished shards hold prompts that another is to hold, so that these are copied and not computed."""

# n rows of a shard, N of all shards whose keys are looked at

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prefill_router.activations.commit_log import CommitLog, RecordLocation
from prefill_router.activations.commit_records import shard_name
from prefill_router.corpus.row_keys import Keys


class Sources:
    """What a ledger holds of the parts of a plan, which are given by the digests of their rows.

    No two shards of a plan hold the same prompt, and what repeats one is done after it. So a record of a part, with
    whatever columns, is a source of that part alone. Keys are read only of the records that the plan does not know.
    """

    def __init__(self, ledger: CommitLog, digests: Sequence[str]) -> None:
        self.ledger = ledger
        self._own = [ledger.positions([shard_name(digest, c) for digest in digests]) for c in ledger.column_sets]

    def of(self, index: int, keys: Keys) -> tuple[RecordLocation, ...]:
        """Where the records lie that hold prompts of part `index`, whose keys (n, 3) these are.

        Under whatever id: 64 bits of a prompt are compared.
        """
        own = [int(positions[index]) for positions in self._own if positions[index] >= 0]
        return tuple(self._places[position] for position in [*own, *self._strangers_with(keys)])

    @cached_property
    def _places(self) -> list[RecordLocation]:
        return self.ledger.places(np.arange(len(self.ledger)))

    def _strangers_with(self, keys: Keys) -> list[int]:
        contents, owners = self._contents
        if not len(contents):
            return []
        starts, ends = (np.searchsorted(contents, keys[:, 1], side) for side in ("left", "right"))
        is_held = starts < ends
        held = [owners[a:b] for a, b in zip(starts[is_held], ends[is_held], strict=True)]
        return [int(position) for position in np.unique(np.concatenate(held))] if held else []

    @cached_property
    def _contents(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """64 bits of each prompt (N,) of the records that the plan does not know, sorted, and those records."""
        is_strange = np.ones(len(self.ledger), np.bool_)
        for positions in self._own:
            is_strange[positions[positions >= 0]] = False
        held = [(keys[:, 1].copy(), position) for position, keys in self.ledger.keys(np.flatnonzero(is_strange))]
        contents = np.concatenate([np.zeros(0, np.uint64), *(part for part, _ in held)])
        owners = np.repeat(np.array([position for _, position in held], np.int64), [len(part) for part, _ in held])
        order = np.argsort(contents, kind="stable")
        return contents[order], owners[order]
