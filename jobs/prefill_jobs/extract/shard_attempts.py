"""Counts the attempts at each shard of a job."""

from __future__ import annotations

from collections import defaultdict


class ShardAttempts:
    """Attempts by shard. One object is shared by a job's workers and outlives them."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)

    def begin(self, digest: str) -> int:
        self.counts[digest] += 1
        return self.counts[digest]
