"""From a layer's activations to a few features: standardise, then PCA, both from the layer's moments alone."""

# N prompts, D hidden size, P features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.moments import Moments
from prefill_router.schema import ActivationColumn

MIN_FEATURES, MAX_FEATURES = 50, 300
EXPLAINED_VARIANCE = 0.95


@dataclass(frozen=True)
class Projection:
    """Maps activations (N, D) of one column to features (N, P): ((x - mean) / std) @ components."""

    column: ActivationColumn
    mean: NDArray[np.float32]  # (D,)
    std: NDArray[np.float32]  # (D,)
    components: NDArray[np.float32]  # (D, P), orthonormal columns

    @property
    def num_features(self) -> int:
        return int(self.components.shape[1])

    def __call__(self, activations: NDArray[Any]) -> NDArray[np.float32]:
        standardised = (activations.astype(np.float32) - self.mean) / self.std
        return np.asarray(standardised @ self.components)


def fit_projection(column: ActivationColumn, moments: Moments) -> Projection:
    """The principal components that explain 95 % of the standardised variance, at least 50 of them and at most 300.

    Never more than the hidden size or than the prompts less one, which is all that can vary.
    """
    covariance = moments.covariance
    std = np.sqrt(np.diag(covariance))
    std[std == 0.0] = 1.0
    variances, vectors = np.linalg.eigh(covariance / np.outer(std, std))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    explained = np.cumsum(variances) / variances.sum() if variances.sum() else np.ones_like(variances)
    wanted = int(np.searchsorted(explained, EXPLAINED_VARIANCE)) + 1
    limit = min(MAX_FEATURES, len(std), max(1, int(moments.count) - 1))
    num_features = min(max(wanted, MIN_FEATURES), limit)
    return Projection(
        column,
        moments.mean.astype(np.float32),
        std.astype(np.float32),
        np.ascontiguousarray(vectors[:, :num_features], np.float32),
    )
