"""Mergeable moments: count, mean and scatter, overall and by class. Every probe and projection is computed from them.

Moments of shards merge in any order to the moments of the whole, so one pass over the data is enough. All sums are
float64. Means are subtracted before squaring, and merges follow Chan, Golub and LeVeque (1979).
"""

# N prompts, M of them, D hidden size, T targets, F folds, C = 2 classes: wrong, correct

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

NUM_FOLDS = 32
ROUNDING = 1e-12  # spread of a constant dimension, relative to its mean

# Rows are subtracted only if every dimension keeps this share of its scatter, which leaves 12 of float64's 16 digits.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) of a set of vectors; scatter is the sum of (x - mean)(x - mean)^T."""

    count: float
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: ArrayLike | Tensor, device: torch.device | None = None) -> Moments:
        """Computes the moments of `x` (N, D), where N may be 0."""
        x_ND = _float64(x, device)
        mean = x_ND.mean(0) if len(x_ND) else x_ND.new_zeros(x_ND.shape[1])
        centred = x_ND - mean
        return cls(float(len(x_ND)), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not other.count or not self.count:
            return self if self.count else other
        delta = other.mean - self.mean
        scatter = (self.scatter + other.scatter).addr_(delta, delta, alpha=self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    def without(self, x_MD: Tensor) -> Moments | None:
        """Removes the rows `x_MD`, some but not all of those included: the inverse of a merge.

        Returns None if that would lose precision, because `x_MD` has nearly all of some dimension's scatter.
        """
        count = self.count - len(x_MD)
        centred = x_MD - self.mean
        shift = centred.sum(0) / -count  # from the mean of all rows to the mean of the remaining ones
        rows = torch.cat([centred, count**0.5 * shift[None]])
        scatter = torch.addmm(self.scatter, rows.T, rows, alpha=-1)
        constant = self.count * (ROUNDING * self.mean) ** 2
        if (scatter.diagonal() < _LEAST_SHARE * self.scatter.diagonal() - constant).any():
            return None
        return Moments(count, self.mean + shift, scatter)

    def to(self, device: torch.device) -> Moments:
        return Moments(self.count, self.mean.to(device), self.scatter.to(device))

    @property
    def covariance(self) -> Tensor:
        """The population covariance (D, D), divided by the count."""
        return self.scatter / self.count


@dataclass(frozen=True)
class ClassMoments:
    """Moments of the prompts that one target was graded on, with counts and sums by fold and class.

    `squares` is the sum of the squared outcomes.

    An outcome between 0 and 1 counts in both classes, in that proportion.
    """

    graded: Moments
    counts_FC: Tensor
    sums_FCD: Tensor
    squares: float

    @property
    def share_correct(self) -> float:
        return float(self.counts_FC[:, 1].sum()) / self.graded.count if self.graded.count else float("nan")

    @property
    def relative_variance(self) -> float:
        """The variance of the outcomes divided by p1 p0: 1 if all are 0 or 1, less if some are between."""
        p1 = self.share_correct
        return max((self.squares / self.graded.count - p1**2) / (p1 * (1.0 - p1)), ROUNDING)

    @property
    def mean_difference(self) -> Tensor:
        """The mean of correct prompts minus the mean of wrong ones (D,); NaN if a class is empty."""
        means_CD = self.sums_FCD.sum(0) / self.counts_FC.sum(0)[:, None]
        return means_CD[1] - means_CD[0]

    @property
    def within_covariance(self) -> Tensor:
        """p1 Cov(X|1) + p0 Cov(X|0) (D, D), computed as the covariance minus the between-class scatter."""
        p1, delta = self.share_correct, self.mean_difference
        within: Tensor = torch.addr(self.graded.covariance, delta, delta, alpha=-p1 * (1.0 - p1))
        return within


@dataclass(frozen=True)
class LabelledMoments:
    """Moments of one activation column for all targets; `target(t)` returns those of one target.

    Targets graded on the same prompts share one scatter; a merge keeps two targets together if both sides do. Memory
    is D^2 numbers for each distinct set of graded prompts, plus 2 F T D for the sums. `squares_T` are sums of squared
    outcomes.
    """

    groups: tuple[Moments, ...]
    group_of: tuple[int, ...]  # (T,)
    counts_FCT: Tensor
    sums_FCTD: Tensor
    squares_T: Tensor

    @classmethod
    def of(
        cls,
        x: ArrayLike | Tensor,
        correct: ArrayLike,
        keys: NDArray[np.uint64] | None = None,
        device: torch.device | None = None,
    ) -> LabelledMoments:
        """Computes the moments of `x` (N, D) with outcomes `correct` (N, T) in [0, 1], NaN for an ungraded pair.

        `keys` (N,) are prompt hashes that assign prompts to NUM_FOLDS folds; by default prompts are assigned in turn.
        """
        labels_NT = np.asarray(correct, np.float64)
        graded_NT = ~np.isnan(labels_NT)
        seen = np.asarray(graded_NT.any(1))
        x_ND, labels_NT, graded_NT = _float64(x, device)[torch.from_numpy(seen)], labels_NT[seen], graded_NT[seen]
        masks, group_of = _deduplicated([mask.tobytes() for mask in graded_NT.T])
        groups = _moments_by_mask(x_ND, [torch.from_numpy(np.frombuffer(mask, bool).copy()) for mask in masks])
        keys = np.arange(len(seen), dtype=np.uint64) if keys is None else keys
        fold_of = torch.from_numpy((keys[seen] % np.uint64(NUM_FOLDS)).astype(np.int64))
        squares_T = torch.from_numpy(np.nansum(labels_NT**2, 0)).to(x_ND.device)
        return cls(groups, group_of, *_class_sums(x_ND, torch.from_numpy(labels_NT), fold_of), squares_T)

    def merge(self, other: LabelledMoments) -> LabelledMoments:
        pairs, group_of = _deduplicated(list(zip(self.group_of, other.group_of, strict=True)))
        groups = tuple(self.groups[a].merge(other.groups[b]) for a, b in pairs)
        return LabelledMoments(
            groups,
            group_of,
            self.counts_FCT + other.counts_FCT,
            self.sums_FCTD + other.sums_FCTD,
            self.squares_T + other.squares_T,
        )

    def to(self, device: torch.device) -> LabelledMoments:
        groups = tuple(group.to(device) for group in self.groups)
        sums = (self.counts_FCT, self.sums_FCTD, self.squares_T)
        return LabelledMoments(groups, self.group_of, *(total.to(device) for total in sums))

    def target(self, t: int) -> ClassMoments:
        return ClassMoments(
            self.groups[self.group_of[t]], self.counts_FCT[:, :, t], self.sums_FCTD[:, :, t], float(self.squares_T[t])
        )


def _float64(x: ArrayLike | Tensor, device: torch.device | None) -> Tensor:
    if not isinstance(x, Tensor):
        x = torch.from_numpy(np.array(x, order="C"))
    return x.to(device, torch.float64)


def _deduplicated(values: list[Any]) -> tuple[list[Any], tuple[int, ...]]:
    """Returns the distinct values in order of first occurrence, and the index of each value in that list."""
    distinct = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return list(distinct), tuple(distinct[value] for value in values)


def _moments_by_mask(x_ND: Tensor, masks: list[Tensor]) -> tuple[Moments, ...]:
    """Computes the moments of each mask's rows. Masks that keep most rows are derived from one scatter of all rows."""
    whole: Moments | None = None
    result = []
    for mask in masks:
        found = None
        if 2 * int(mask.sum()) > len(mask):
            whole = whole or Moments.of(x_ND)
            found = whole if mask.all() else whole.without(x_ND[~mask])
        result.append(found or Moments.of(x_ND[mask]))
    return tuple(result)


def _class_sums(x_ND: Tensor, labels_NT: Tensor, fold_of: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of prompts and the sums (D,) of their activations, by fold, class and target."""
    weights_NCT = torch.stack([1.0 - labels_NT, labels_NT], 1).nan_to_num(0.0).to(x_ND.device)
    counts_FCT = x_ND.new_zeros(NUM_FOLDS, *weights_NCT.shape[1:])
    sums_FCTD = x_ND.new_zeros(*counts_FCT.shape, x_ND.shape[1])
    for fold in range(NUM_FOLDS):
        rows = fold_of == fold
        counts_FCT[fold] = weights_NCT[rows].sum(0)
        sums_FCTD[fold] = torch.tensordot(weights_NCT[rows], x_ND[rows], dims=([0], [0]))
    return counts_FCT, sums_FCTD
