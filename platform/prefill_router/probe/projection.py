"""Projection of a layer's activations to features: standardisation, then PCA, both fitted from the layer's moments."""

# N prompts, D hidden size, P features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefill_router.common.schema import ActivationColumn
from prefill_router.probe.moments import Moments

MIN_FEATURES, MAX_FEATURES = 50, 300
EXPLAINED_VARIANCE = 0.95
WHITEN_FLOOR = 1e-4  # least variance that whitening divides by; a standardised dimension has 1

EXACT_HIDDEN_SIZE = 2048  # above this size, eigenvectors are approximated
_OVERSAMPLES = 32
_MAX_ITERATIONS = 50
_CONVERGED = 1e-7


@dataclass(frozen=True)
class Projection:
    """Maps activations (N, D) of one column to features (N, P): ((x - mean) / std) @ components."""

    column: ActivationColumn
    mean: NDArray[np.float32]  # (D,)
    std: NDArray[np.float32]  # (D,)
    components: NDArray[np.float32]  # (D, P), orthogonal columns, of length 1 unless whitened

    @property
    def num_features(self) -> int:
        return int(self.components.shape[1])

    def __call__(self, activations: NDArray[Any]) -> NDArray[np.float32]:
        standardised = (activations.astype(np.float32) - self.mean) / self.std
        # torch, as in the code around it: numpy's threads would wait for cores that torch's threads still occupy.
        return (torch.from_numpy(standardised) @ torch.from_numpy(self.components)).numpy()


def fit_projection(
    column: ActivationColumn, moments: Moments, *, whiten: bool = False, max_features: int = MAX_FEATURES
) -> Projection:
    """Fits the principal components that explain 95 % of the standardised variance, from 50 up to `max_features`.

    There are never more than the hidden size, or than the number of prompts minus one. With `whiten`, features are
    scaled to unit variance, where a variance below WHITEN_FLOOR counts as WHITEN_FLOOR.
    """
    covariance = moments.covariance
    std = covariance.diagonal().clamp(min=0.0).sqrt()
    std[std == 0.0] = 1.0
    correlation = covariance / torch.outer(std, std)
    limit = min(max_features, len(std), max(1, int(moments.count) - 1))
    variances, components = principal_components(correlation, limit)
    components = components[:, : min(max(_num_wanted(variances, float(correlation.trace())), MIN_FEATURES), limit)]
    if whiten:
        components = components / variances[: components.shape[1]].clamp(min=WHITEN_FLOOR).sqrt()
    arrays = (np.ascontiguousarray(t.cpu().numpy(), np.float32) for t in (moments.mean, std, components))
    return Projection(column, *arrays)


def _num_wanted(variances: Tensor, total: float) -> int:
    """Returns how many components explain EXPLAINED_VARIANCE of the total; may exceed the number there are."""
    return int((variances.cumsum(0) < EXPLAINED_VARIANCE * total).sum()) + 1


def principal_components(covariance: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Returns the `num` greatest eigenvalues, in descending order, and their eigenvectors (D, num).

    Exact up to EXACT_HIDDEN_SIZE. Above it, uses randomised subspace iteration (Halko, Martinsson and Tropp, 2011)
    until no wanted eigenvalue changes by more than 1e-7 of the greatest.
    """
    if len(covariance) <= EXACT_HIDDEN_SIZE:
        values, vectors = torch.linalg.eigh(covariance)
    else:
        values, vectors = _subspace_iteration(covariance, num)
    return values.flip(0)[:num], vectors.flip(1)[:, :num]


def _subspace_iteration(covariance: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Returns ascending eigenvalues and the eigenvectors of `covariance`, in a subspace that has the greatest `num`."""
    size = len(covariance)
    draws = np.random.default_rng(0).normal(size=(size, min(size, num + _OVERSAMPLES)))
    basis = torch.linalg.qr(covariance @ torch.from_numpy(draws).to(covariance)).Q
    before = None
    for _ in range(_MAX_ITERATIONS):
        image = covariance @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        if before is not None and (values - before)[-num:].abs().max() <= _CONVERGED * values[-1]:
            break
        before = values
        basis = torch.linalg.qr(image).Q
    return values, basis @ rotation
