"""Trains all seeds of an ensemble at once, each with its own initial weights, row order, dropout and early stopping.

Under torch.distributed each worker has its own rows, and losses and gradients are summed over workers. A trainer's
state at the end of an epoch lets another trainer resume to the same result.
"""

# K seeds, A of them still active, B rows of a batch, T targets

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from prefill_router.common.errors import UserError
from prefill_router.predictor.counter_random import fold, seed_keys
from prefill_router.predictor.data_loader import Rows, Window, WorkerRows
from prefill_router.predictor.recipe import Recipe
from prefill_router.predictor.trunk import SharedTrunkNet, loss_sums

_SEEDS_APART = 1_000  # the seeds of an ensemble are seed * 1000 + k
_VALIDATION_ROWS = 8192
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's published defaults


@dataclass(frozen=True)
class FittedTrunk:
    """The kept seeds, by ascending validation loss."""

    net: SharedTrunkNet
    validation_losses: list[float]  # of the kept seeds
    best_epochs: list[int]
    num_epochs: int


class Trainer:
    """Trains one ensemble."""

    def __init__(
        self,
        recipe: Recipe,
        num_features: int,
        weights_T: Sequence[float],
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.recipe, self.device = recipe, device or torch.device("cpu")
        self.weights_T = torch.tensor(weights_T, dtype=torch.float32, device=self.device)
        sizes = [num_features, *recipe.hidden, len(weights_T)]
        seeds = [seed * _SEEDS_APART + k for k in range(recipe.num_seeds)]
        self.net = SharedTrunkNet(sizes, len(seeds), (recipe.input_dropout, *recipe.dropout))
        self.net.reset(seeds)
        self.net.to(self.device)
        self.keys = seed_keys(seeds, self.device)
        self.moments = [
            {
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in self.net.parameters()
        ]
        self.epoch = 0
        self.active = torch.arange(len(seeds), device=self.device)
        self.best = [p.detach().clone() for p in self.net.parameters()]
        self.best_losses = torch.full((len(seeds),), math.inf, dtype=torch.float32, device=self.device)
        self.best_epochs = torch.zeros(len(seeds), dtype=torch.long, device=self.device)

    @property
    def is_done(self) -> bool:
        return not len(self.active) or self.epoch >= self.recipe.max_epochs

    # --- an epoch ------------------------------------------------------------------------------------------------

    def train(self, window: Window) -> None:
        """Runs one pass over a window."""
        rows, features = window.rows, self._read(window.rows)
        keys_A = fold(self.keys[self.active], self.epoch)
        num_steps = max(1, round(window.num_rows / self.recipe.batch_size))
        order, counts = window.batches(keys_A, num_steps)
        starts = counts.cumsum(1) - counts
        widest = counts.amax(0).tolist()
        for step in range(num_steps):
            place = starts[:, step, None] + torch.arange(widest[step], device=self.device)
            rows_AB = order.gather(1, place.clamp(max=max(len(rows) - 1, 0)))
            is_own = torch.arange(widest[step], device=self.device) < counts[:, step, None]
            with self._precision:
                outputs = self.net(features[rows_AB], fold(keys_A[:, None], rows.keys[rows_AB]))
            self._descend(outputs.float(), rows.labels[rows_AB].where(is_own[..., None], torch.nan))

    @property
    def _precision(self) -> torch.autocast:
        is_bfloat16 = self.recipe.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16)

    def _read(self, rows: Rows) -> Tensor:
        """Returns features in the precision of the matrix products."""
        return rows.features.bfloat16() if self.recipe.precision == "bfloat16" else rows.features

    def _descend(self, outputs: Tensor, labels: Tensor) -> None:
        if self.recipe.label_smoothing:
            labels = labels + self.recipe.label_smoothing * (0.5 - labels)
        loss_A, weight_A = loss_sums(outputs, labels, self.weights_T)
        for parameter in self.net.parameters():
            parameter.grad = None
        loss_A.sum().backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        *sums, weight_A = _over_workers([*gradients, weight_A])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total / weight_A.clamp(min=1e-9)[:, None, None])
        self._step()

    @torch.no_grad()
    def _step(self) -> None:
        """Takes one step of Adam. Calls torch's functional API: its optimizer classes import the compiler (seconds)."""
        algorithm = adamw if self.recipe.decoupled_decay else adam
        parameters: list[Tensor] = list(self.net.parameters())
        algorithm(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [moments["exp_avg"] for moments in self.moments],
            [moments["exp_avg_sq"] for moments in self.moments],
            [],
            [moments["step"] for moments in self.moments],
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            eps=_EPSILON,
            maximize=False,
        )

    @torch.no_grad()
    def validate(self, validation: Iterable[Rows]) -> None:
        """Ends an epoch: saves the weights of seeds with a new best loss, and stops seeds that ran out of patience."""
        sum_A = torch.zeros(len(self.active), dtype=torch.float32, device=self.device)
        weight_A = torch.zeros_like(sum_A)
        for rows in validation:
            for start in range(0, len(rows), _VALIDATION_ROWS):
                part = slice(start, start + _VALIDATION_ROWS)
                with self._precision:
                    outputs = self.net(self._read(rows[part]))
                loss, weight = loss_sums(outputs.float(), rows.labels[part], self.weights_T)
                sum_A += loss
                weight_A += weight
        sum_A, weight_A = _over_workers([sum_A, weight_A])
        loss_A = sum_A / weight_A
        is_better = loss_A < self.best_losses[self.active]
        better = self.active[is_better]
        self.best_losses[better] = loss_A[is_better]
        self.best_epochs[better] = self.epoch
        for best, current in zip(self.best, self.net.parameters(), strict=True):
            best[better] = current[is_better]
        self._stop_others(self.epoch - self.best_epochs[self.active] < self.recipe.patience)
        self.epoch += 1

    def _stop_others(self, continues: Tensor) -> None:
        """Removes the stopped seeds from the batched computation."""
        if continues.all():
            return
        self.active = self.active[continues]
        for parameter in self.net.parameters():
            parameter.data = parameter.data[continues]
            parameter.grad = None
        self.moments = [{n: v[continues] if v.ndim else v for n, v in moments.items()} for moments in self.moments]

    # --- state and result ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Returns everything that the next epoch depends on, as flat tensors."""
        tensors = {"epoch": torch.tensor(self.epoch), "active": self.active}
        tensors |= {"best_losses": self.best_losses, "best_epochs": self.best_epochs}
        for i, (best, parameter) in enumerate(zip(self.best, self.net.parameters(), strict=True)):
            tensors |= {f"{i}.best": best, f"{i}.value": parameter.detach()}
            tensors |= {f"{i}.adam.{name}": value for name, value in self.moments[i].items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resumes from the state of a trainer created with the same arguments."""
        self.epoch = int(tensors["epoch"])
        self.active, self.best_losses, self.best_epochs = (
            tensors[name].to(self.device) for name in ("active", "best_losses", "best_epochs")
        )
        for i, parameter in enumerate(self.net.parameters()):
            self.best[i] = tensors[f"{i}.best"].to(self.device)
            parameter.data = tensors[f"{i}.value"].to(self.device)
            self.moments[i] = {name: tensors[f"{i}.adam.{name}"].clone().to(self.device) for name in self.moments[i]}

    def fitted(self) -> FittedTrunk:
        """Returns the `recipe.keep` best seeds. Raises UserError if no validation loss is finite."""
        num_finite = int(self.best_losses.isfinite().sum())
        if not num_finite:
            raise UserError("training diverged, or no validation prompt has an outcome: check the outcomes")
        kept = torch.argsort(self.best_losses, stable=True)[: min(self.recipe.keep, num_finite)]
        names = [name for name, _ in self.net.named_parameters()]
        net = SharedTrunkNet.from_state({n: p[kept].cpu() for n, p in zip(names, self.best, strict=True)})
        return FittedTrunk(net, self.best_losses[kept].tolist(), self.best_epochs[kept].tolist(), self.epoch)


def fit(feed: WorkerRows, trainer: Trainer, seed: int, after_epoch: Callable[[float], None] = lambda _: None) -> None:
    """Trains until every seed is done.

    Calls `after_epoch` with the epoch's training rows per second, over all workers.
    """
    key = seed_keys([seed])[0]
    while not trainer.is_done:
        started = time.perf_counter()
        for window in feed.windows(fold(key, trainer.epoch)):
            trainer.train(window)
        trainer.validate(feed.validation_rows())
        after_epoch(sum(feed.num_rows) / (time.perf_counter() - started))


def _over_workers(tensors: list[Tensor]) -> list[Tensor]:
    """Sums tensors over all workers, in one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
