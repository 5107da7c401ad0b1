"""Mergeable sums: count, mean and scatter, overall and by class. Every probe and projection follows from them alone.

Sums of any shards merge in any order to the sums of the whole, so one pass over the data serves them all.
Everything is float64; means are subtracted before squares are taken, and merges follow Chan, Golub and LeVeque (1979).
"""

# N prompts, D hidden size, T targets

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D), the sum of (x - mean)(x - mean)^T, of a set of vectors."""

    count: float
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, x: ArrayLike) -> Moments:
        """The moments of `x` (N, D); of no rows, too."""
        x_ND = torch.tensor(np.ascontiguousarray(x, np.float64))
        if not len(x_ND):
            size = x_ND.shape[1]
            return cls(0.0, np.zeros(size), np.zeros((size, size)))
        mean = x_ND.mean(0)
        centred = x_ND - mean
        return cls(float(len(x_ND)), mean.numpy(), (centred.T @ centred).numpy())

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not other.count or not self.count:
            return self if self.count else other
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Array:
        """Population covariance (D, D): divided by the count."""
        return self.scatter / self.count


@dataclass(frozen=True)
class ClassMoments:
    """Moments of the prompts on which a target was graded, and of those that it answered correctly.

    An outcome between 0 and 1 belongs to both classes, in that proportion.
    """

    graded: Moments
    num_correct: float
    mean_correct: Array

    def merge(self, other: ClassMoments) -> ClassMoments:
        num_correct = self.num_correct + other.num_correct
        total = self.num_correct * self.mean_correct + other.num_correct * other.mean_correct
        return ClassMoments(self.graded.merge(other.graded), num_correct, total / max(num_correct, 1e-300))

    @property
    def share_correct(self) -> float:
        return self.num_correct / self.graded.count if self.graded.count else float("nan")

    @property
    def mean_difference(self) -> Array:
        """Mean of the correct less mean of the wrong (D,)."""
        # The overall mean lies between both class means, in proportion to their shares.
        return (self.mean_correct - self.graded.mean) / (1.0 - self.share_correct)

    @property
    def within_covariance(self) -> Array:
        """p1 Cov(X|1) + p0 Cov(X|0) (D, D): what is left of the covariance without the spread between the classes."""
        p1, delta = self.share_correct, self.mean_difference
        return self.graded.covariance - p1 * (1.0 - p1) * np.outer(delta, delta)


def class_moments(x: ArrayLike, correct: ArrayLike) -> list[ClassMoments]:
    """The moments of each target, of `x` (N, D) and `correct` (N, T) in [0, 1], NaN where a pair was not graded.

    Targets that were graded on the same rows share one scatter, which is nearly all of the work.
    """
    x_ND, correct_NT = np.asarray(x, np.float64), np.asarray(correct, np.float64)
    graded_NT = ~np.isnan(correct_NT)
    shared: dict[bytes, Moments] = {}
    result = []
    for target in range(correct_NT.shape[1]):
        graded = graded_NT[:, target]
        key = graded.tobytes()
        if key not in shared:
            shared[key] = Moments.of(x_ND[graded])
        weights = correct_NT[graded, target]
        num_correct = float(weights.sum())
        mean_correct = weights @ x_ND[graded] / num_correct if num_correct else np.zeros(x_ND.shape[1])
        result.append(ClassMoments(shared[key], num_correct, mean_correct))
    return result
