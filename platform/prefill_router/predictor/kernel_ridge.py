"""A kernel machine: among a few thousand graded prompts, nearness tells more than a net can learn.

Kernel ridge regression with the kernel exp(-sqrt(|x - x'| / lengthscale)), of the gamma-exponential family (Rasmussen
and Williams, 2006, 4.2.1), on landmarks that are the training prompts, or a sample of them. What targets have in
common is learnt from all of them: labels are turned to their principal components, of which the first is how hard a
prompt is, and each component is regularised as its exact leave-one-out error asks (Rifkin and Lippert, 2007).
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

MAX_LANDMARKS = 8192
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)  # of the ridge, beside a kernel whose diagonal is 1
_SWEEPS = 10  # over missing labels
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
        """Says `mean` (O,) of every prompt."""
        landmarks, coefficients = np.empty((0, num_features), np.float16), np.empty((0, len(mean)), np.float32)
        return cls(landmarks, 1.0, coefficients, mean)

    @cached_property
    def _places(self) -> _Places:
        return _Places.of(torch.from_numpy(self.landmarks).float())

    @torch.inference_mode()
    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        coefficients = torch.from_numpy(self.coefficients)
        outputs = torch.empty(len(features), len(self.mean), dtype=torch.float32)
        for start in range(0, len(features), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            kernel = _kernel(torch.from_numpy(features[rows]), self._places, self.lengthscale)
            outputs[rows] = kernel @ coefficients
        return outputs.numpy() + self.mean

    def of_outputs(self, outputs: Sequence[int]) -> KernelMachine:
        """The same machine with some of its outputs."""
        own = list(outputs)
        return replace(self, coefficients=np.ascontiguousarray(self.coefficients[:, own]), mean=self.mean[own])

    def joined(self, other: KernelMachine) -> KernelMachine:
        """With the outputs of another machine, on the same landmarks, after its own."""
        coefficients = np.concatenate([self.coefficients, other.coefficients], axis=1)
        return replace(self, coefficients=coefficients, mean=np.concatenate([self.mean, other.mean]))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As flat arrays, for an artifact."""
        scale = np.array([self.lengthscale], np.float32)
        return {
            "landmarks": self.landmarks,
            "lengthscale": scale,
            "coefficients": self.coefficients,
            "mean": self.mean,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> KernelMachine:
        """Raises KeyError where one is missing."""
        landmarks, coefficients, mean = (tensors[name] for name in ("landmarks", "coefficients", "mean"))
        return cls(landmarks, float(tensors["lengthscale"].item()), coefficients, mean)


def fit_kernel(features: NDArray[np.float32], labels: Sequence[NDArray[np.float32]]) -> KernelMachine:
    """The machine whose landmarks are all N prompts with `features` (N, F).

    `labels` are groups (N, O) of outputs that have components in common, NaN where missing: what is missing is taken to
    be as the machine says, which is repeated a few times.
    """
    landmarks = torch.from_numpy(features).half()
    x = landmarks.float()
    lengthscale = max(float(x.var(0).sum().sqrt()), _MIN_LENGTHSCALE)
    kernel = _kernel(x, _Places.of(x), lengthscale).fill_diagonal_(1.0)  # where the distance is rounding alone
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
    return KernelMachine(landmarks.numpy(), lengthscale, coefficients.numpy(), mean.numpy())


def _components(centred: Tensor, sizes: Sequence[int]) -> Tensor:
    """The principal axes (O, O) of each group of labels, as one orthogonal matrix."""
    basis = torch.zeros(centred.shape[1], centred.shape[1], dtype=torch.float32)
    for stop, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True):
        own = slice(stop - size, stop)
        basis[own, own] = torch.linalg.eigh(centred[:, own].T @ centred[:, own]).eigenvectors
    return basis


class _Places(NamedTuple):
    """Landmarks as distances want them."""

    transposed: Tensor  # (F, M)
    squares: Tensor  # (M,) of their norms

    @classmethod
    def of(cls, landmarks: Tensor) -> _Places:
        return cls(landmarks.T.contiguous(), landmarks.square().sum(1))


def _kernel(x: Tensor, places: _Places, lengthscale: float) -> Tensor:
    squares = torch.addmm(places.squares, x, places.transposed, alpha=-2.0)
    squares += x.square().sum(1, keepdim=True)
    return squares.clamp_(min=0.0).div_(lengthscale**2).sqrt_().sqrt_().neg_().exp_()


def _means(labels: Sequence[NDArray[np.float32]]) -> Tensor:
    """The mean of each output's labels; where there is none, that of its group."""
    means = []
    for group in labels:
        counts, sums = (~np.isnan(group)).sum(0), np.nansum(group, axis=0)
        overall = sums.sum() / max(counts.sum(), 1)
        means.append(np.where(counts > 0, sums / np.maximum(counts, 1), overall))
    return torch.from_numpy(np.concatenate(means).astype(np.float32))


class _Ridge:
    """Ridge regressions on one kernel matrix (M, M), whose eigenvalues make every strength cheap."""

    def __init__(self, kernel: Tensor) -> None:
        self.values, self.vectors = torch.linalg.eigh(kernel)
        self.values.clamp_(min=0.0)

    def coefficients(self, y: Tensor, strengths: Tensor) -> Tensor:
        """Coefficients (M, O) of labels (M, O), each output with a strength of its own."""
        return self.vectors @ (self.vectors.T @ y / (self.values[:, None] + strengths))  # type: ignore[no-any-return]

    def best_strengths(self, y: Tensor) -> Tensor:
        """Those (O,) with which labels are told best of prompts left out; infinite where no strength tells anything.

        Without prompt i, its residual is coefficient_i / inverse_ii, of the inverse of the kernel with its ridge.
        """
        errors = [y.square().mean(0)]
        for strength in STRENGTHS:
            inverse_diagonal = self.vectors.square() @ (1.0 / (self.values + strength))
            residuals = self.coefficients(y, torch.tensor(strength, dtype=torch.float32)) / inverse_diagonal[:, None]
            errors.append(residuals.square().mean(0))
        return torch.tensor([torch.inf, *STRENGTHS], dtype=torch.float32)[torch.stack(errors).argmin(0)]
