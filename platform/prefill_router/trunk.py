"""SharedTrunkNet: one MLP over the features with an output for each target, trained for all seeds at once.

The seeds of an ensemble are one batched computation: every weight has a leading seed dimension. Each seed still has
its own initial weights, data order, dropout, early stopping and best weights. Source: METHOD, "SharedTrunkNet".
"""

# K seeds, B rows of a batch, N prompts, F features, H hidden units, T targets

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from prefill_router.errors import UserError

Loss = Literal["cross_entropy", "squared_error"]


@dataclass(frozen=True)
class Recipe:
    """How a trunk is trained. The defaults are the published ones."""

    hidden: tuple[int, ...] = (256, 128)
    dropout: tuple[float, ...] = (0.3, 0.2)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 512
    max_epochs: int = 150
    patience: int = 15
    num_seeds: int = 10
    keep: int = 5
    loss: Loss = "cross_entropy"


class SharedTrunkNet(nn.Module):
    """K independent MLPs F -> hidden -> T with ReLU and dropout, as one batched module."""

    def __init__(self, sizes: Sequence[int], num_seeds: int, dropout: Sequence[float] = ()) -> None:
        """`sizes` runs from features to targets, over the hidden ones."""
        super().__init__()
        self.dropout = tuple(dropout)
        self.weights = nn.ParameterList(torch.zeros(num_seeds, i, o) for i, o in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(num_seeds, 1, o) for o in sizes[1:])

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> SharedTrunkNet:
        """The net of a state dict, for inference: the tensors tell its shape. Raises RuntimeError if they don't fit."""
        weights = [state[f"weights.{layer}"] for layer in range(len(state) // 2)]
        sizes = [weights[0].shape[1], *(weight.shape[2] for weight in weights)]
        net = cls(sizes, len(weights[0]))
        net.load_state_dict(dict(state))
        return net.requires_grad_(False)

    @torch.no_grad()
    def reset(self, generators: Sequence[torch.Generator]) -> None:
        """Draws each seed's weights from its own generator, as nn.Linear does: uniform within 1 / sqrt(fan-in)."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1.0 / math.sqrt(weight.shape[1])
            for k, generator in enumerate(generators):
                weight[k].uniform_(-bound, bound, generator=generator)
                bias[k].uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Outputs (K, B, T), logits for cross-entropy, of features (B, F), or (K, B, F) with rows of each seed's own.

        With a generator for each seed, dropout is on.
        """
        x = features.expand(len(self.weights[0]), *features.shape[-2:])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < len(self.weights) - 1:
                x = F.relu(x)
                if generators is not None:
                    x = x * _dropout_mask(x, self.dropout[layer], generators)
        return x


def _dropout_mask(x_KBH: Tensor, rate: float, generators: Sequence[torch.Generator]) -> Tensor:
    kept = torch.stack([torch.rand(x_KBH.shape[1:], generator=g) for g in generators]) >= rate
    return kept / (1.0 - rate)


@dataclass(frozen=True)
class Examples:
    """Features (N, F) and labels (N, T) on this worker; a NaN label is missing."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class FittedTrunk:
    """The kept seeds, lowest validation loss first."""

    net: SharedTrunkNet
    validation_losses: list[float]  # of the kept seeds
    best_epochs: list[int]
    num_epochs: int


def fit_trunk(
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    seed: int,
) -> FittedTrunk:
    """Trains `recipe.num_seeds` trunks at once and keeps those with the lowest validation loss.

    Under torch.distributed each worker brings its own rows: gradients and losses are sums over all workers' rows,
    divided by the number of observed labels in them, so workers with fewer rows, or none left, do no harm.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    sizes = [train.features.shape[1], *recipe.hidden, train.labels.shape[1]]
    net = SharedTrunkNet(sizes, recipe.num_seeds, recipe.dropout)
    net.reset(_generators(recipe.num_seeds, seed, 0))
    # Every worker starts from the same weights, and draws its own order and dropout.
    generators = _generators(recipe.num_seeds, seed, 1 + rank)
    optimizer = torch.optim.Adam(net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    best = _Best(net, recipe)
    for epoch in range(recipe.max_epochs):
        _train_epoch(net, optimizer, train, recipe, generators)
        losses = _validation_losses(net, validation, recipe.loss)
        best.update(epoch, losses)
        if best.all_stopped:
            break
    return best.fitted(epoch + 1)


def _generators(num_seeds: int, seed: int, stream: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed((seed * 1_000 + k) * 1_000 + stream) for k in range(num_seeds)]


def _train_epoch(
    net: SharedTrunkNet,
    optimizer: torch.optim.Optimizer,
    train: Examples,
    recipe: Recipe,
    generators: Sequence[torch.Generator],
) -> None:
    workers = dist.get_world_size() if dist.is_initialized() else 1
    batch_size = max(1, recipe.batch_size // workers)
    steps = int(_over_workers(torch.tensor(math.ceil(len(train) / batch_size)), dist.ReduceOp.MAX))
    order_KN = torch.stack([torch.randperm(len(train), generator=g) for g in generators])
    for step in range(steps):
        rows_KB = order_KN[:, step * batch_size : (step + 1) * batch_size]
        outputs = net(train.features[rows_KB], generators)
        loss_K, observed_K = _loss_sums(outputs, train.labels[rows_KB], recipe.loss)
        optimizer.zero_grad()
        loss_K.sum().backward()  # type: ignore[no-untyped-call]
        observed_K = _over_workers(observed_K).clamp(min=1)
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad = _over_workers(parameter.grad) / observed_K[:, None, None]
        optimizer.step()


def _loss_sums(outputs_KBT: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Each seed's summed loss (K,) and its number of observed labels (K,)."""
    labels = labels.expand_as(outputs_KBT)
    observed = ~labels.isnan()
    function = F.binary_cross_entropy_with_logits if loss == "cross_entropy" else F.mse_loss
    losses = function(outputs_KBT, labels.nan_to_num(0.0), reduction="none")
    return (losses * observed).sum((1, 2)), observed.sum((1, 2)).to(losses.dtype)


@torch.no_grad()
def _validation_losses(net: SharedTrunkNet, validation: Examples, loss: Loss) -> Tensor:
    total_K, observed_K = _loss_sums(net(validation.features), validation.labels, loss)
    return _over_workers(total_K) / _over_workers(observed_K)


def _over_workers(value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value, op)
    return value


class _Best:
    """Each seed's best weights so far, and whether it has stopped."""

    def __init__(self, net: SharedTrunkNet, recipe: Recipe) -> None:
        self.net, self.recipe = net, recipe
        self.losses = torch.full((recipe.num_seeds,), math.inf)
        self.epochs = torch.zeros(recipe.num_seeds, dtype=torch.long)
        self.stopped = torch.zeros(recipe.num_seeds, dtype=torch.bool)
        self.parameters = [p.detach().clone() for p in net.parameters()]

    @property
    def all_stopped(self) -> bool:
        return bool(self.stopped.all())

    def update(self, epoch: int, losses: Tensor) -> None:
        # A seed that has stopped still computes with the rest, to no effect.
        better = (losses < self.losses) & ~self.stopped
        self.losses = torch.where(better, losses, self.losses)
        self.epochs[better] = epoch
        for kept, current in zip(self.parameters, self.net.parameters(), strict=True):
            kept[better] = current.detach()[better]
        self.stopped |= epoch - self.epochs >= self.recipe.patience

    def fitted(self, num_epochs: int) -> FittedTrunk:
        if not torch.isfinite(self.losses).any():
            raise UserError("training diverged, or no validation prompt has an outcome: check the outcomes")
        kept = torch.argsort(self.losses, stable=True)[: min(self.recipe.keep, int(self.losses.isfinite().sum()))]
        names = [name for name, _ in self.net.named_parameters()]
        net = SharedTrunkNet.from_state({n: p[kept] for n, p in zip(names, self.parameters, strict=True)})
        return FittedTrunk(net, self.losses[kept].tolist(), self.epochs[kept].tolist(), num_epochs)
