"""How far a prompt lies from those that a router was trained on: what it says of strangers deserves less trust.

Mahalanobis distance in the router's features, from the mean and covariance of its training prompts, and the share of
these that lie nearer. Each training prompt's own distance is the exact one to the moments of all the others, so that a
new prompt of the same kind is no farther than they are.
"""

# N prompts, M training prompts, F features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHRINKAGE = 1e-3  # of the mean variance, added to each: features that hardly vary tell nothing
_MIN_PROMPTS = 50


@dataclass(frozen=True)
class TrainingDistance:
    """Make one with `TrainingDistance.of`."""

    mean: Tensor  # (F,)
    whitener: Tensor  # (F, F), whose product with a deviation has the distance as its length
    known: NDArray[np.float32]  # (M,) sorted distances of the training prompts

    @classmethod
    def of(cls, features: NDArray[Any]) -> TrainingDistance | None:
        """Of the features (M, F) of training prompts, or a sample of them; None where they are too few to tell."""
        count, num_features = features.shape
        if count < _MIN_PROMPTS:
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
        return cls(x.mean(0).float(), whitener.float(), known)

    @torch.inference_mode()
    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Distances (N,) of features (N, F): the root mean square over features, 1 for an ordinary prompt."""
        return ((torch.from_numpy(features) - self.mean) @ self.whitener).square().sum(1).sqrt().numpy()

    def percentile(self, distances: NDArray[np.float32]) -> NDArray[np.float64]:
        """The share (N,) of training prompts that lie nearer, in [0, 1]."""
        return np.searchsorted(self.known, distances) / len(self.known)
