"""Drift: the distance of a prompt from a router's training prompts; predictions far from them are less reliable.

The distance is Mahalanobis, in the router's features, with the mean and covariance of the training prompts. A prompt's
percentile is the share of training prompts that are nearer. Each training prompt's own distance is exactly that from
the moments of the others (leave-one-out), so that new prompts of the same kind have uniform percentiles.
"""

# N prompts, M training prompts, F features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHRINKAGE = 1e-3  # share of the mean variance added to each, so that nearly constant features do not dominate
_MIN_PROMPTS = 50


@dataclass(frozen=True)
class TrainingDistance:
    """The distance from a set of training prompts. Build one with `TrainingDistance.of`."""

    mean: Tensor  # (F,)
    whitener: Tensor  # (F, F); the distance is the length of (features - mean) @ whitener
    known: NDArray[np.float32]  # (M,) sorted distances of the training prompts
    columns: NDArray[np.int64] | slice  # (F,) the features that it uses

    @classmethod
    def of(cls, features: NDArray[Any], columns: NDArray[np.int64] | slice = slice(None)) -> TrainingDistance | None:
        """Fits `columns` (F,) of the features (M, all) of training prompts, or of a sample.

        Returns None for fewer than 50 prompts, or without columns.
        """
        features = features[:, columns]
        count, num_features = features.shape
        if count < _MIN_PROMPTS or not num_features:
            return None
        x = torch.from_numpy(np.asarray(features, np.float64))
        deviations = x - x.mean(0)
        scatter = deviations.T @ deviations
        scatter.diagonal().add_(max(_SHRINKAGE * float(scatter.trace()) / num_features, 1e-12))
        factor = torch.linalg.cholesky(torch.linalg.inv(scatter))  # inverse = factor @ factor.T
        squares = (deviations @ factor).square().sum(1)
        # Without prompt i, the mean moves by d / (M - 1) and the scatter loses d d^T M / (M - 1) (Sherman-Morrison).
        share = count / (count - 1)
        own = share**2 * (count - 1) * squares / (1.0 - share * squares).clamp(min=1e-9)
        known = np.sort((own / num_features).sqrt().numpy().astype(np.float32))
        whitener = factor * (count / num_features) ** 0.5
        return cls(x.mean(0).float(), whitener.float(), known, columns)

    @torch.inference_mode()
    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns distances (N,) of features (N, all), as a root mean square over `columns`: 1 for a usual prompt."""
        x = torch.from_numpy(features[:, self.columns])
        return ((x - self.mean) @ self.whitener).square().sum(1).sqrt().numpy()

    def percentile(self, distances: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns the share (N,) of training prompts that are nearer, in [0, 1]."""
        return np.searchsorted(self.known, distances) / len(self.known)
