"""Pools each layer's hidden states to one vector per prompt as the forward pass reaches the layer."""

# B prompts in a pack, T their tokens, D hidden size, C columns, P tokens of a shared prefix

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prefill_router.common.schema import ActivationColumn

FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass
class PrefixSums:
    """Sums of a shared prefix's states per layer, which the mean pooling of every continuing prompt includes."""

    num_tokens: int
    leave_out_first: bool
    start: PrefixSums | None = None  # sums over the tokens before the visited ones
    by_layer: dict[int, Tensor] = field(default_factory=dict)  # (D,) float32

    def visit(self, layer: int, states_TD: Tensor) -> None:
        if self.start is not None:
            self.by_layer[layer] = self.start.by_layer[layer] + states_TD.sum(0, dtype=torch.float32)
        else:
            self.by_layer[layer] = states_TD[int(self.leave_out_first) :].sum(0, dtype=torch.float32)


class Pooler:
    """Collects `columns` of one pack, layer by layer, as float16. Clamps values outside float16's range.

    Each layer's values are first divided by its entry in `scales`, unless that is empty. `mean` averages a prompt's
    tokens. If `leave_out_first`, it excludes the first one, unless that is the only token.
    """

    def __init__(
        self,
        columns: Sequence[ActivationColumn],
        lengths: Sequence[int],
        device: torch.device,
        leave_out_first: bool,
        prefix: PrefixSums | None = None,
        scales: Sequence[int] = (),
    ) -> None:
        self.columns, self.prefix, self.scales = columns, prefix, scales
        # With a prefix, the first token is in the prefix.
        self.skipped = [int(leave_out_first and prefix is None and n > 1) for n in lengths]
        self.lengths = list(lengths)
        ends = np.cumsum(lengths)
        counts = np.array(lengths) - self.skipped
        if prefix is not None:
            counts = counts + prefix.num_tokens - int(prefix.leave_out_first)
        self.last = torch.from_numpy(ends - 1).to(device)
        self.first = torch.from_numpy((ends - lengths)[np.array(self.skipped, bool)]).to(device)
        self.segments = torch.tensor(self.lengths, device=device)
        self.counts = torch.from_numpy(counts)[:, None].to(device, torch.float32)
        self.pooled: dict[ActivationColumn, Tensor] = {}

    def visit(self, layer: int, states_TD: Tensor) -> None:
        self._follow(states_TD.device)
        for column in self.columns:
            if column.layer == layer:
                pooled = states_TD[self.last].float() if column.pooling == "last" else self._mean(layer, states_TD)
                if self.scales:
                    pooled = pooled / self.scales[layer]
                self.pooled[column] = pooled.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)

    def result(self) -> Tensor:
        """Returns the pooled columns, (C, B, D) float16: on their device, or on the host if they are on several."""
        pooled = [self.pooled[column] for column in self.columns]
        if len({values.device for values in pooled}) > 1:
            pooled = [values.cpu() for values in pooled]
        return torch.stack(pooled)

    def _follow(self, device: torch.device) -> None:
        """Moves the indices to the states' device: the layers of a divided model are on several GPUs."""
        if self.last.device != device:
            self.last, self.first = self.last.to(device), self.first.to(device)
            self.segments, self.counts = self.segments.to(device), self.counts.to(device)

    def _mean(self, layer: int, states_TD: Tensor) -> Tensor:
        sums_BD = self._sums(states_TD)
        if self.prefix is not None:
            sums_BD += self.prefix.by_layer[layer]
        return sums_BD / self.counts

    def _sums(self, states_TD: Tensor) -> Tensor:
        """Returns (B, D) float32. Sums each prompt separately, so that other prompts do not change a bit of its sum."""
        if states_TD.is_cuda:  # one kernel; checking the lengths would synchronise with the device, hence `unsafe`
            states = states_TD.to(torch.float32, copy=len(self.first) > 0)
            if len(self.first):
                states.index_fill_(0, self.first, 0)
            return torch.segment_reduce(states, "sum", lengths=self.segments, unsafe=True)
        parts = zip(torch.split(states_TD, self.lengths), self.skipped, strict=True)
        return torch.stack([part[skipped:].sum(0, dtype=torch.float32) for part, skipped in parts])
