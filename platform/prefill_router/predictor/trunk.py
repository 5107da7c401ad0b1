"""SharedTrunkNet: one MLP over the features, with an output for each target, for all seeds of an ensemble at once.

Every weight has a leading seed dimension. Source: platform/METHOD.md, "SharedTrunkNet, as published".
"""

# K seeds, B rows of a batch, F features, H hidden units, O outputs, T targets

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from prefill_router.predictor.counter_random import fold, keep_mask


class SharedTrunkNet(nn.Module):
    """K independent MLPs F -> hidden -> O, with ReLU and dropout, computed as one batch."""

    def __init__(self, sizes: Sequence[int], num_seeds: int, dropout: Sequence[float] = ()) -> None:
        """`sizes` lists the layers, from features to outputs; `dropout` is the rate on each layer's input."""
        super().__init__()
        self.dropout = tuple(dropout)
        zeros = partial(torch.zeros, dtype=torch.float32)
        self.weights = nn.ParameterList(zeros(num_seeds, i, o) for i, o in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(zeros(num_seeds, 1, o) for o in sizes[1:])

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> SharedTrunkNet:
        """Builds a net for inference, shaped by a state dict. Raises RuntimeError if its tensors do not match."""
        weights = [state[f"weights.{layer}"] for layer in range(len(state) // 2)]
        sizes = [weights[0].shape[1], *(weight.shape[2] for weight in weights)]
        net = cls(sizes, len(weights[0]))
        net.load_state_dict(dict(state))
        return net.requires_grad_(False)

    def of_outputs(self, outputs: Sequence[int]) -> SharedTrunkNet:
        """Returns the same net with some of its outputs, by index."""
        last, own = len(self.weights) - 1, list(outputs)
        state = dict(self.state_dict())
        state |= {f"{name}.{last}": state[f"{name}.{last}"][..., own].contiguous() for name in ("weights", "biases")}
        return SharedTrunkNet.from_state(state)

    @torch.no_grad()
    def reset(self, seeds: Sequence[int]) -> None:
        """Draws each seed's weights from its own generator, like nn.Linear: uniform within 1 / sqrt(fan-in)."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1.0 / math.sqrt(weight.shape[1])
            for k, generator in enumerate(generators):
                weight[k].uniform_(-bound, bound, generator=generator)
                bias[k].uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor, keys: Tensor | None = None) -> Tensor:
        """Returns outputs (K, B, O) for features (B, F), or for (K, B, F) with separate rows for each seed.

        Dropout is on if int32 `keys` (K, B) are given; its masks are drawn from them.
        """
        last = len(self.weights) - 1
        return self._layer(last, self.hidden(features, keys), keys)

    def hidden(self, features: Tensor, keys: Tensor | None = None) -> Tensor:
        """Returns the last hidden layer (K, B, H), or the features if there is none."""
        x = features.expand(len(self.weights[0]), *features.shape[-2:])
        for layer in range(len(self.weights) - 1):
            x = F.relu(self._layer(layer, x, keys))
        return x

    def _layer(self, layer: int, x: Tensor, keys: Tensor | None) -> Tensor:
        if keys is not None and self.dropout[layer]:
            kept = keep_mask(fold(keys, layer), x.shape[-1], self.dropout[layer])
            x = x * (kept * x.new_tensor(256 / (256 - round(256 * self.dropout[layer]))))
        return torch.baddbmm(self.biases[layer], x, self.weights[layer])


def loss_sums(outputs: Tensor, labels: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each seed's weighted sum of cross-entropies (K,), and the sum of weights of observed labels (K,).

    `outputs` (K, B, T) are logits; `labels` are (B, T) or (K, B, T), NaN where missing.
    """
    labels = labels.expand(len(outputs), *labels.shape[-2:])
    observed, labels = ~labels.isnan(), labels.nan_to_num(0.0)
    losses = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    weights = observed * weights_T
    return (losses * weights).sum((1, 2)), weights.sum((1, 2))
