"""Kernel ridge regression, which predicts better than a net if only a few thousand prompts are graded.

The kernel is exp(-sqrt(|x - x'| / lengthscale)), of the gamma-exponential family (Rasmussen and Williams, 2006, 4.2.1).
The landmarks are the training prompts, or a sample of them. Labels are rotated to their principal components, so that
targets share what they have in common; the first component is how hard a prompt is. Each component has its own ridge
strength, picked by the exact leave-one-out error (Rifkin and Lippert, 2007).
"""

# N prompts, M landmarks, F features, O outputs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefill_router.common.console import doing

MAX_LANDMARKS = 8192
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)  # of the ridge; the kernel's diagonal is 1
_SWEEPS = 10  # of imputing missing labels
_MIN_LENGTHSCALE = 1e-6
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class KernelMachine:
    """Maps features (N, F) to outputs (N, O): mean + kernel(features, landmarks) @ coefficients."""

    landmarks: NDArray[np.float16]  # (M, F)
    lengthscale: float
    coefficients: NDArray[np.float32]  # (M, O)
    mean: NDArray[np.float32]  # (O,)

    @classmethod
    def constant(cls, mean: NDArray[np.float32], num_features: int) -> KernelMachine:
        """Returns a machine that predicts `mean` (O,) for every prompt."""
        landmarks, coefficients = np.empty((0, num_features), np.float16), np.empty((0, len(mean)), np.float32)
        return cls(landmarks, 1.0, coefficients, mean)

    @cached_property
    def _points(self) -> _Points:
        return _Points.of(torch.from_numpy(self.landmarks).float())

    @torch.inference_mode()
    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        coefficients = torch.from_numpy(self.coefficients)
        outputs = torch.empty(len(features), len(self.mean), dtype=torch.float32)
        for start in range(0, len(features), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            kernel = _kernel(torch.from_numpy(features[rows]), self._points, self.lengthscale)
            outputs[rows] = kernel @ coefficients
        return outputs.numpy() + self.mean

    def of_outputs(self, outputs: Sequence[int]) -> KernelMachine:
        """Returns the same machine with some of its outputs, by index."""
        own = list(outputs)
        return replace(self, coefficients=np.ascontiguousarray(self.coefficients[:, own]), mean=self.mean[own])

    def joined(self, other: KernelMachine) -> KernelMachine:
        """Appends the outputs of another machine with the same landmarks."""
        coefficients = np.concatenate([self.coefficients, other.coefficients], axis=1)
        return replace(self, coefficients=coefficients, mean=np.concatenate([self.mean, other.mean]))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays that an artifact stores."""
        return {
            "landmarks": self.landmarks,
            "lengthscale": np.array([self.lengthscale], np.float32),
            "coefficients": self.coefficients,
            "mean": self.mean,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> KernelMachine:
        """Reads the arrays of `tensors`. Raises KeyError if one is missing."""
        landmarks, coefficients, mean = (tensors[name] for name in ("landmarks", "coefficients", "mean"))
        return cls(landmarks, float(tensors["lengthscale"].item()), coefficients, mean)


@doing("fitting the kernel machine")
def fit_kernel(features: NDArray[np.float32], labels: Sequence[NDArray[np.float32]]) -> KernelMachine:
    """Fits a machine whose landmarks are all N prompts, with features (N, F).

    `labels` are groups (N, O) of outputs, NaN where missing; the outputs of one group share principal components.
    Missing labels are imputed with the machine's own predictions, in _SWEEPS rounds.
    """
    return _fit(features, labels).machine


def fit_and_leave_one_out(
    features: NDArray[np.float32], labels: Sequence[NDArray[np.float32]]
) -> tuple[KernelMachine, NDArray[np.float32]]:
    """Fits a machine as `fit_kernel` does; also returns, of each of the N prompts, what it predicts without it (N, O).

    The ridge strengths, the principal components and imputed labels are those of all prompts.
    """
    machine, ridge, strengths, basis, centred = _fit(features, labels)
    left_out = (centred @ basis - ridge.residuals(centred @ basis, strengths)) @ basis.T
    return machine, left_out.numpy() + machine.mean


class _Fit(NamedTuple):
    machine: KernelMachine
    ridge: _Ridge
    strengths: Tensor  # (O,)
    basis: Tensor  # (O, O)
    centred: Tensor  # (N, O) labels less their mean, imputed where missing


def _fit(features: NDArray[np.float32], labels: Sequence[NDArray[np.float32]]) -> _Fit:
    landmarks = torch.from_numpy(features).half()
    x = landmarks.float()
    lengthscale = max(float(x.var(0).sum().sqrt()), _MIN_LENGTHSCALE)
    kernel = _kernel(x, _Points.of(x), lengthscale).fill_diagonal_(1.0)  # removes rounding from the distance 0
    y = torch.cat([torch.from_numpy(group) for group in labels], dim=1)
    missing, mean = y.isnan(), _means(labels)
    centred = (y - mean).where(~missing, 0.0)
    basis = _components(centred, [group.shape[1] for group in labels])
    ridge = _Ridge(kernel)
    strengths = ridge.best_strengths(centred @ basis)
    coefficients = ridge.coefficients(centred @ basis, strengths) @ basis.T
    for _ in range(_SWEEPS if missing.any() else 0):
        centred = torch.where(missing, kernel @ coefficients, centred)
        coefficients = ridge.coefficients(centred @ basis, strengths) @ basis.T
    machine = KernelMachine(landmarks.numpy(), lengthscale, coefficients.numpy(), mean.numpy())
    return _Fit(machine, ridge, strengths, basis, centred)


def _components(centred: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the principal axes of each group of labels, as one orthogonal matrix (O, O)."""
    basis = torch.zeros(centred.shape[1], centred.shape[1], dtype=torch.float32)
    for stop, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True):
        own = slice(stop - size, stop)
        basis[own, own] = torch.linalg.eigh(centred[:, own].T @ centred[:, own]).eigenvectors
    return basis


class _Points(NamedTuple):
    """Landmarks in the form that computes distances fast."""

    transposed: Tensor  # (F, M)
    squares: Tensor  # (M,) squared norms

    @classmethod
    def of(cls, landmarks: Tensor) -> _Points:
        return cls(landmarks.T.contiguous(), landmarks.square().sum(1))


def _kernel(x: Tensor, points: _Points, lengthscale: float) -> Tensor:
    squares = torch.addmm(points.squares, x, points.transposed, alpha=-2.0)
    squares += x.square().sum(1, keepdim=True)
    return squares.clamp_(min=0.0).div_(lengthscale**2).sqrt_().sqrt_().neg_().exp_()


def _means(labels: Sequence[NDArray[np.float32]]) -> Tensor:
    """Returns the mean of each output's labels; an output without labels gets the mean of its group."""
    means = []
    for group in labels:
        counts, sums = (~np.isnan(group)).sum(0), np.nansum(group, axis=0)
        overall = sums.sum() / max(counts.sum(), 1)
        means.append(np.where(counts > 0, sums / np.maximum(counts, 1), overall))
    return torch.from_numpy(np.concatenate(means).astype(np.float32))


class _Ridge:
    """Ridge regressions on one kernel matrix (M, M). Its eigendecomposition makes every strength cheap."""

    def __init__(self, kernel: Tensor) -> None:
        self.values, self.vectors = torch.linalg.eigh(kernel)
        self.values.clamp_(min=0.0)

    def coefficients(self, y: Tensor, strengths: Tensor) -> Tensor:
        """Returns coefficients (M, O) for labels (M, O), each output with its own strength."""
        return self.vectors @ (self.vectors.T @ y / (self.values[:, None] + strengths))  # type: ignore[no-any-return]

    def residuals(self, y: Tensor, strengths: Tensor) -> Tensor:
        """Returns labels (M, O) less what is predicted without them, each output with its own strength.

        The residual of prompt i is coefficient_i / inverse_ii, where inverse = (kernel + ridge)^-1. An infinite
        strength predicts the mean.
        """
        inverse_diagonals = self.vectors.square() @ (1.0 / (self.values[:, None] + strengths))
        return torch.where(strengths.isinf(), y, self.coefficients(y, strengths) / inverse_diagonals)

    def best_strengths(self, y: Tensor) -> Tensor:
        """Returns the strengths (O,) with the least leave-one-out error; infinite if predicting the mean is best."""
        errors = [y.square().mean(0)]
        for strength in STRENGTHS:
            residuals = self.residuals(y, torch.tensor([strength], dtype=torch.float32))
            errors.append(residuals.square().mean(0))
        return torch.tensor([torch.inf, *STRENGTHS], dtype=torch.float32)[torch.stack(errors).argmin(0)]
