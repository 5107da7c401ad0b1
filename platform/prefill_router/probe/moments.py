"""Mergeable sums: count, mean and scatter, overall and by class. Every probe and projection follows from them alone.

Sums of any shards merge in any order to the sums of the whole, so one pass over the data serves them all.
Everything is float64; means are subtracted before squares are taken, and merges follow Chan, Golub and LeVeque (1979).
"""

# N prompts, M of them, D hidden size, T targets, F folds, C = 2 classes: wrong, right

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

NUM_FOLDS = 32
ROUNDING = 1e-12  # relative to its mean, the spread of a dimension that never varies

# Rows are taken out of a sum only while every dimension keeps this share of its scatter: 12 of float64's 16 digits.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D), the sum of (x - mean)(x - mean)^T, of some vectors, all on one device."""

    count: float
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: ArrayLike | Tensor, device: torch.device | None = None) -> Moments:
        """The moments of `x` (N, D); of no rows, too."""
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
        """The moments of the other rows: the inverse of a merge with those of `x_MD`, some of the rows but not all.

        None where the difference would cost digits, for some dimension's scatter is nearly all in `x_MD`.
        """
        count = self.count - len(x_MD)
        centred = x_MD - self.mean
        shift = centred.sum(0) / -count  # from the mean of all to that of the others
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
        """Population covariance (D, D): divided by the count."""
        return self.scatter / self.count


@dataclass(frozen=True)
class ClassMoments:
    """Moments of the prompts on which a target was graded, and by class and fold their counts and sums.

    An outcome between 0 and 1 belongs to both classes, in that proportion.
    """

    graded: Moments
    counts_FC: Tensor
    sums_FCD: Tensor

    @property
    def share_correct(self) -> float:
        return float(self.counts_FC[:, 1].sum()) / self.graded.count if self.graded.count else float("nan")

    @property
    def mean_difference(self) -> Tensor:
        """Mean of the right less mean of the wrong (D,); NaN where there are none of one."""
        means_CD = self.sums_FCD.sum(0) / self.counts_FC.sum(0)[:, None]
        return means_CD[1] - means_CD[0]

    @property
    def within_covariance(self) -> Tensor:
        """p1 Cov(X|1) + p0 Cov(X|0) (D, D): what is left of the covariance without the spread between the classes."""
        p1, delta = self.share_correct, self.mean_difference
        within: Tensor = torch.addr(self.graded.covariance, delta, delta, alpha=-p1 * (1.0 - p1))
        return within


@dataclass(frozen=True)
class LabelledMoments:
    """The moments of one column for all targets; `target(t)` shows those of one.

    Targets that were graded on the same prompts so far share one scatter. A merge keeps two targets together where both
    sides do. So it takes D^2 numbers for each set of prompts that some target was graded on, and 2 F T D for the sums.
    """

    groups: tuple[Moments, ...]
    group_of: tuple[int, ...]  # (T,)
    counts_FCT: Tensor
    sums_FCTD: Tensor

    @classmethod
    def of(
        cls,
        x: ArrayLike | Tensor,
        correct: ArrayLike,
        keys: NDArray[np.uint64] | None = None,
        device: torch.device | None = None,
    ) -> LabelledMoments:
        """Of `x` (N, D) and `correct` (N, T) in [0, 1], NaN where a pair was not graded.

        `keys` (N,), hashes of the prompts, say which of NUM_FOLDS folds each is in; without them they take turns.
        """
        labels_NT = np.asarray(correct, np.float64)
        graded_NT = ~np.isnan(labels_NT)
        seen = np.asarray(graded_NT.any(1))
        x_ND, labels_NT, graded_NT = _float64(x, device)[torch.from_numpy(seen)], labels_NT[seen], graded_NT[seen]
        masks, group_of = _in_order([mask.tobytes() for mask in graded_NT.T])
        groups = _moments_by_mask(x_ND, [torch.from_numpy(np.frombuffer(mask, bool).copy()) for mask in masks])
        keys = np.arange(len(seen), dtype=np.uint64) if keys is None else keys
        fold_of = torch.from_numpy((keys[seen] % np.uint64(NUM_FOLDS)).astype(np.int64))
        return cls(groups, group_of, *_class_sums(x_ND, torch.from_numpy(labels_NT), fold_of))

    def merge(self, other: LabelledMoments) -> LabelledMoments:
        pairs, group_of = _in_order(list(zip(self.group_of, other.group_of, strict=True)))
        groups = tuple(self.groups[a].merge(other.groups[b]) for a, b in pairs)
        return LabelledMoments(groups, group_of, self.counts_FCT + other.counts_FCT, self.sums_FCTD + other.sums_FCTD)

    def to(self, device: torch.device) -> LabelledMoments:
        groups = tuple(group.to(device) for group in self.groups)
        return LabelledMoments(groups, self.group_of, self.counts_FCT.to(device), self.sums_FCTD.to(device))

    def target(self, t: int) -> ClassMoments:
        return ClassMoments(self.groups[self.group_of[t]], self.counts_FCT[:, :, t], self.sums_FCTD[:, :, t])


def _float64(x: ArrayLike | Tensor, device: torch.device | None) -> Tensor:
    if not isinstance(x, Tensor):
        x = torch.from_numpy(np.array(x, order="C"))
    return x.to(device, torch.float64)


def _in_order(names: list[Any]) -> tuple[list[Any], tuple[int, ...]]:
    """The different names as they first occur, and the place there of each."""
    different = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(different), tuple(different[name] for name in names)


def _moments_by_mask(x_ND: Tensor, masks: list[Tensor]) -> tuple[Moments, ...]:
    """The moments of the rows of each mask. Nearly all of the work is one scatter, where most masks keep most rows."""
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
    """By fold, class and target: how many prompts, and the sums (D,) of their activations."""
    weights_NCT = torch.stack([1.0 - labels_NT, labels_NT], 1).nan_to_num(0.0).to(x_ND.device)
    counts_FCT = x_ND.new_zeros(NUM_FOLDS, *weights_NCT.shape[1:])
    sums_FCTD = x_ND.new_zeros(*counts_FCT.shape, x_ND.shape[1])
    for fold in range(NUM_FOLDS):
        rows = fold_of == fold
        counts_FCT[fold] = weights_NCT[rows].sum(0)
        sums_FCTD[fold] = torch.tensordot(weights_NCT[rows], x_ND[rows], dims=([0], [0]))
    return counts_FCT, sums_FCTD
