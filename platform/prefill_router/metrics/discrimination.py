"""Discrimination and calibration of one target's P(correct): ROC AUC, expected calibration error, Brier score."""

# N prompts, M bins, B weightings, G distinct predictions, P groups of rewards

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CALIBRATION_BINS = 15


def roc_auc(correct: ArrayLike, p: ArrayLike) -> float:
    """The probability that a right answer has a higher p than a wrong one; equal p count half. NaN if a class is empty.

    For rewards between 0 and 1, it is the share of the pairs with different rewards that p puts in the right order
    (the concordance of Harrell et al., 1982). NaN if all rewards are equal.
    """
    return float(TargetScores(correct, p).auc(once(correct))[0])


def expected_calibration_error(correct: ArrayLike, p: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Mean of |accuracy - mean p| over bins of equal width, weighted by their prompts (Guo et al., 2017)."""
    return float(TargetScores(correct, p, bins).ece(once(correct))[0])


def brier_score(correct: ArrayLike, p: ArrayLike) -> float:
    """Mean squared difference of outcome and prediction (Brier, 1950); NaN without prompts."""
    return float(TargetScores(correct, p).brier(once(correct))[0])


def reliability_curve(correct: ArrayLike, p: ArrayLike, bins: int = CALIBRATION_BINS) -> Array:
    """Rows (M, 3) of (mean p, accuracy, number of prompts) for the non-empty bins of equal width.

    This is the reliability diagram of Guo et al. (2017); `correct` and `p` are (N,).
    """
    y, scores = np.asarray(correct, np.float64), np.asarray(p, np.float64)
    index = _bin(scores, bins)
    counts = np.bincount(index, minlength=bins)
    sums = np.column_stack([np.bincount(index, weights=values, minlength=bins) for values in (scores, y)])
    filled = counts > 0
    return np.column_stack([sums[filled] / counts[filled, None], counts[filled]])


class TargetScores:
    """Scores of one target under many weightings of its graded prompts. Each method maps weights (B, N) to (B,)."""

    def __init__(self, correct: ArrayLike, p: ArrayLike, bins: int = CALIBRATION_BINS) -> None:
        y, scores = np.asarray(correct, np.float64), np.asarray(p, np.float64)
        self._order = np.argsort(scores, kind="stable")
        self._y, self._p = y[self._order], scores[self._order]
        self._comparisons = _Comparison.all(y, scores)
        self._first_of_bin = np.flatnonzero(np.diff(_bin(self._p, bins), prepend=-1) > 0)

    def auc(self, weights_BN: Array) -> Array:
        pairs = [comparison.pairs(weights_BN) for comparison in self._comparisons]
        ordered, compared = np.sum(pairs, axis=0) if pairs else np.zeros((2, len(weights_BN)))
        return ratio(ordered, compared)

    def ece(self, weights_BN: Array) -> Array:
        weights = weights_BN[:, self._order]
        errors = _sums(weights * (self._y - self._p), self._first_of_bin)
        return ratio(np.abs(errors).sum(1), weights.sum(1))

    def brier(self, weights_BN: Array) -> Array:
        weights = weights_BN[:, self._order]
        return ratio(weights @ (self._p - self._y) ** 2, weights.sum(1))


class _Comparison(NamedTuple):
    """The pairs of prompts whose rewards, numbered in ascending order, first differ in one binary digit.

    There is one comparison for right and wrong answers, and one for each digit of the number of distinct rewards. Each
    pair is in one of them, so that many weightings need no loop over pairs.
    """

    order: NDArray[np.int64]  # (N,) prompts by the digits before this one, then by prediction
    is_higher: NDArray[np.bool_]  # (N,) whether this digit is 1, in that order
    first: NDArray[np.int64]  # (G,) start of each distinct prediction in a group of equal digits before this one
    first_of_group: NDArray[np.int64]  # (P,) index in `first` of each group's start

    @classmethod
    def all(cls, rewards: Array, p: Array) -> list[Self]:
        levels, rank = np.unique(rewards, return_inverse=True)
        return [cls._of(rank >> digit, p) for digit in reversed(range((len(levels) - 1).bit_length()))]

    @classmethod
    def _of(cls, digits: NDArray[np.int64], p: Array) -> Self:
        group = digits >> 1
        order = np.lexsort((p, group))
        starts_group = np.diff(group[order], prepend=-1) > 0
        first = np.flatnonzero(starts_group | (np.diff(p[order], prepend=-np.inf) > 0.0))
        return cls(order, (digits & 1 == 1)[order], first, np.flatnonzero(starts_group[first]))

    def pairs(self, weights_BN: Array) -> tuple[Array, Array]:
        """The weights (B,) of the pairs in the right order, equal predictions counting half, and of all pairs."""
        weights = weights_BN[:, self.order]
        higher, lower = (_sums(weights * part, self.first) for part in (self.is_higher, ~self.is_higher))
        highs, lows = (_sums(values, self.first_of_group) for values in (higher, lower))
        below, before = (np.cumsum(values, axis=1) - values for values in (lower, lows))
        ordered = (higher * (below + lower / 2.0)).sum(1) - (highs * before).sum(1)
        return ordered, (highs * lows).sum(1)


def has_partial_credit(correct: ArrayLike) -> bool:
    """Whether any outcome is between 0 and 1, as those of a judge are; NaN is missing."""
    outcomes = np.asarray(correct)
    return bool(((outcomes > 0.0) & (outcomes < 1.0)).any())


def once(values: ArrayLike) -> Array:
    """The weighting (1, N) that counts every prompt once."""
    return np.ones((1, len(np.asarray(values))))


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """The quotient; NaN where the denominator is not positive."""
    below = np.asarray(denominator, np.float64)
    positive = below > 0.0
    return np.where(positive, np.asarray(numerator) / np.where(positive, below, 1.0), np.nan)


def _bin(p: Array, bins: int) -> NDArray[np.int64]:
    return np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)


def _sums(values_BN: Array, first: NDArray[np.int64]) -> Array:
    """Sums (B, G) of the runs of columns that start at `first` (G,)."""
    if not len(first):
        return np.zeros((len(values_BN), 0))
    return np.asarray(np.add.reduceat(values_BN, first, axis=1))
