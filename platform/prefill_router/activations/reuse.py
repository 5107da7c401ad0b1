"""Finds committed shards that hold prompts of a planned shard, so that activations are copied and not computed."""

# n rows of a shard, N rows of all shards whose keys are read

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prefill_router.activations.commit_log import CommitLog, RecordLocation
from prefill_router.activations.commit_records import shard_name
from prefill_router.corpus.row_keys import RowKeys


class Sources:
    """Looks up records in a commit log for the parts of a plan, which are given by the digests of their rows.

    Two shards of a plan never hold the same prompt, and repeats are processed after the shards. So a record of a part,
    with any columns, is a source for that part only. Keys are read only for records that are not in the plan.
    """

    def __init__(self, log: CommitLog, digests: Sequence[str]) -> None:
        self.log = log
        self._own = [log.positions([shard_name(digest, c) for digest in digests]) for c in log.column_sets]

    def of(self, index: int, keys: RowKeys) -> tuple[RecordLocation, ...]:
        """The locations of the records that hold prompts of part `index`, given its keys (n, 3).

        Compares 64 bits of the prompts and ignores their ids.
        """
        own = [int(positions[index]) for positions in self._own if positions[index] >= 0]
        return tuple(self._places[position] for position in [*own, *self._others_with(keys)])

    @cached_property
    def _places(self) -> list[RecordLocation]:
        return self.log.places(np.arange(len(self.log)))

    def _others_with(self, keys: RowKeys) -> list[int]:
        """The positions of records outside the plan that hold one of these prompts."""
        contents, owners = self._contents
        if not len(contents):
            return []
        starts, ends = (np.searchsorted(contents, keys[:, 1], side) for side in ("left", "right"))
        is_found = starts < ends
        found = [owners[start:end] for start, end in zip(starts[is_found], ends[is_found], strict=True)]
        return np.unique(np.concatenate(found)).tolist() if found else []

    @cached_property
    def _contents(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """64 bits of each prompt (N,) in the records outside the plan, sorted, and the positions of their records."""
        is_other = np.ones(len(self.log), np.bool_)
        for positions in self._own:
            is_other[positions[positions >= 0]] = False
        parts = [(keys[:, 1].copy(), position) for position, keys in self.log.keys(np.flatnonzero(is_other))]
        contents = np.concatenate([np.zeros(0, np.uint64), *(part for part, _ in parts)])
        owners = np.repeat(np.array([position for _, position in parts], np.int64), [len(part) for part, _ in parts])
        order = np.argsort(contents, kind="stable")
        return contents[order], owners[order]
