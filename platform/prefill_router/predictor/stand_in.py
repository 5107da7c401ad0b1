"""Stands in for an encoder that is missing: its features, by ridge regression on the features of the other encoders.

Fitted to a sample of the training prompts. The features of the mean training prompt would be worse, by 0.01 to 0.05 of
AUC: see tests/benchmarks/LOG.md.
"""

# N prompts, M training prompts, P present and Q missing features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, relative to the mean eigenvalue


@dataclass(frozen=True)
class StandIn:
    """Maps present features (N, P) to missing ones (N, Q): mean + (present - present_mean) @ weights."""

    present_mean: NDArray[np.float32]  # (P,)
    weights: NDArray[np.float32]  # (P, Q)
    mean: NDArray[np.float32]  # (Q,)

    def __call__(self, present: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self.mean + (present - self.present_mean) @ self.weights, np.float32)

    @classmethod
    def fit(cls, present: NDArray[Any], missing: NDArray[Any]) -> StandIn:
        """Fits features (M, P) and (M, Q) of training prompts, with the strength of the least leave-one-out error.

        Without prompts, the missing features are zero, which is their mean over all training prompts.
        """
        if not len(present):
            shapes = present.shape[1:], (present.shape[1], missing.shape[1]), missing.shape[1:]
            return cls(*(np.zeros(shape, np.float32) for shape in shapes))
        x, y = (torch.from_numpy(np.asarray(values, np.float64)) for values in (present, missing))
        x_mean, y_mean = x.mean(0), y.mean(0)
        weights = _ridge(x - x_mean, y - y_mean)
        return cls(*(values.float().numpy() for values in (x_mean, weights, y_mean)))


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Returns weights (P, Q) for centred x (M, P) and y (M, Q)."""
    found = torch.linalg.eigh(x.T @ x)
    values, vectors = found.eigenvalues.clamp(min=0.0), found.eigenvectors
    rotated = x @ vectors  # (M, P)
    moments, squares = rotated.T @ y, rotated.square()
    scale = float(values.mean()) or 1.0

    def solution(strength: float) -> Tensor:
        solved: Tensor = moments / (values + strength * scale)[:, None]
        return solved

    def error(strength: float) -> float:
        """The mean square of the leave-one-out residuals, residual / (1 - leverage); the mean has leverage 1 / M."""
        leverage = squares @ (1.0 / (values + strength * scale)) + 1.0 / len(x)
        residuals = (y - rotated @ solution(strength)) / (1.0 - leverage).clamp(min=1e-9)[:, None]
        return float(residuals.square().mean())

    weights: Tensor = vectors @ solution(min(STRENGTHS, key=error))
    return weights
