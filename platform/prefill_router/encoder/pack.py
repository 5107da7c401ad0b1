"""A pack: prompts concatenated for one forward pass without padding, after an optional shared prefix."""

# T tokens of a pack, D hidden size, K key-value heads, E head size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from prefill_router.encoder.attention import KeyValue

Visit = Callable[[int, Tensor], None]  # called with the index in `hidden_states` and the states (T, D)


@dataclass(frozen=True)
class Pack:
    """Concatenated prompts, all of which may continue one shared prefix."""

    ids: Tensor  # (T,) int64
    lengths: list[int]  # tokens of each prompt after the prefix
    prefix: list[KeyValue] | None = None  # keys and values of the prefix for each layer, kept by `PackedBackbone.run`

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device, prefix: list[KeyValue] | None = None) -> Pack:
        ids = torch.tensor([i for prompt in prompts for i in prompt])
        if device.type == "cuda":
            ids = ids.pin_memory()
        return cls(ids.to(device, non_blocking=True), [len(prompt) for prompt in prompts], prefix)

    @property
    def prefix_tokens(self) -> int:
        return len(self.prefix[0][0]) if self.prefix else 0

    def positions(self) -> Tensor:
        """Returns each token's position in its prompt, prefix included, (T,) int64."""
        start = self.prefix_tokens
        return torch.cat([torch.arange(start, start + n) for n in self.lengths]).to(self.ids.device)

    def padded(self, multiple: int) -> Pack:
        """Pads the last prompt to make the pack a multiple of `multiple` tokens. Causality hides the padding."""
        padding = -len(self.ids) % multiple
        if not padding:
            return self
        return Pack(F.pad(self.ids, (0, padding)), [*self.lengths[:-1], self.lengths[-1] + padding], self.prefix)
