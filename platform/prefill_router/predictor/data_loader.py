"""Training data: rows of features and labels, read shard by shard, in windows that fit into memory.

Each worker has some of the shards. The order of shards, and of rows within a shard, depends only on the seed and the
epoch (see `counter_random`), so that any number of workers reads the same batches.
"""

# N rows of a window on this worker, S shards, F features, T targets, K seeds

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefill_router.predictor.counter_random import fold, uniform

WINDOW_ROWS = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Features (N, F), labels (N, T) with NaN where missing, and an int32 key (N,) for each row."""

    features: Tensor
    labels: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device) -> Rows:
        return Rows(self.features.to(device), self.labels.to(device), self.keys.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        return Rows(self.features[rows], self.labels[rows], self.keys[rows])

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        features, labels, keys = zip(*((p.features, p.labels, p.keys) for p in parts), strict=True)
        return Rows(torch.cat(features), torch.cat(labels), torch.cat(keys))


@dataclass(frozen=True)
class Window:
    """The rows of some shards, as far as this worker has them."""

    num_rows: int  # on all workers
    rows: Rows
    shards: Tensor  # (S,) indices of this worker's shards
    sizes: Tensor  # (S,) their rows

    def batches(self, keys_K: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Returns row indices (K, N) in each seed's own order, and the batch size of each step (K, num_steps).

        A shard's rows are shuffled and spread evenly over the steps, so that batch sizes differ by a few rows only.
        """
        first = self.sizes.cumsum(0) - self.sizes
        shard_N = torch.repeat_interleave(torch.arange(len(self.sizes), device=self.sizes.device), self.sizes)
        shuffled = (shard_N << 32) + fold(keys_K[:, None], self.rows.keys)
        order_KN = shuffled.argsort(dim=1)  # a shard's rows stay together
        rank_N = torch.arange(len(shard_N), device=shard_N.device) - first[shard_N]
        offset_KS = uniform(fold(keys_K[:, None], self.shards))
        step_KN = ((rank_N + offset_KS[:, shard_N]) / self.sizes[shard_N] * num_steps).long()
        by_step = step_KN.argsort(dim=1, stable=True)
        counts = torch.zeros(len(keys_K), num_steps, dtype=torch.long, device=keys_K.device)
        return order_KN.gather(1, by_step), counts.scatter_add_(1, step_KN, torch.ones_like(step_KN))


@dataclass
class WorkerRows:
    """This worker's rows, by shard. The mappings may read from disk on each access.

    `num_rows` counts the training rows of every shard, including those of other workers. `empty` is a Rows of the
    right shape and length 0.
    """

    num_rows: Sequence[int]
    training: Mapping[int, Rows]
    validation: Mapping[int, Rows]
    empty: Rows
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    window_rows: int = WINDOW_ROWS
    _loaded: tuple[list[int], Window] | None = field(default=None, repr=False)

    def windows(self, key: Tensor) -> Iterator[Window]:
        """Yields all training rows, in windows of shards. `key` (an int32 scalar) sets the order of the shards."""
        for shards in self._plan(key):
            if self._loaded is None or self._loaded[0] != shards:
                self._loaded = None  # frees the memory of the previous window
                self._loaded = shards, self._load(shards)
            yield self._loaded[1]

    def _plan(self, key: Tensor) -> list[list[int]]:
        order = fold(key, torch.arange(len(self.num_rows))).argsort().tolist()
        plan: list[list[int]] = [[]]
        rows = 0
        for shard in order:
            if rows and rows + self.num_rows[shard] > self.window_rows:
                plan.append([])
                rows = 0
            plan[-1].append(shard)
            rows += self.num_rows[shard]
        return [sorted(shards) for shards in plan]

    def _load(self, shards: list[int]) -> Window:
        own = [shard for shard in shards if shard in self.training and self.num_rows[shard]]
        parts = [self.training[shard] for shard in own]
        return Window(
            sum(self.num_rows[shard] for shard in shards),
            Rows.concatenate(parts or [self.empty]).to(self.device),
            torch.tensor(own, dtype=torch.long, device=self.device),
            torch.tensor([len(part) for part in parts], dtype=torch.long, device=self.device),
        )

    def validation_rows(self) -> Iterator[Rows]:
        for shard in self.validation:
            yield self.validation[shard].to(self.device)
