"""Discrimination and calibration of one target's P(correct): ROC AUC, expected calibration error, Brier score."""

# N prompts, M bins, B weightings, G distinct predictions

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CALIBRATION_BINS = 15


def roc_auc(correct: ArrayLike, p: ArrayLike) -> float:
    """The probability that a right answer has a higher p than a wrong one; ties count half. NaN if a class is empty.

    An outcome y between 0 and 1 counts as y of a right answer and 1 - y of a wrong one.
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
        self._first = np.flatnonzero(np.diff(self._p, prepend=-np.inf) > 0.0)  # start of each distinct prediction
        self._first_of_bin = np.flatnonzero(np.diff(_bin(self._p, bins), prepend=-1) > 0)

    def auc(self, weights_BN: Array) -> Array:
        weights = weights_BN[:, self._order]
        right, wrong = (_sums(weights * part, self._first) for part in (self._y, 1.0 - self._y))
        below = np.cumsum(wrong, axis=1) - wrong
        return ratio((right * (below + wrong / 2.0)).sum(1), right.sum(1) * wrong.sum(1))

    def ece(self, weights_BN: Array) -> Array:
        weights = weights_BN[:, self._order]
        errors = _sums(weights * (self._y - self._p), self._first_of_bin)
        return ratio(np.abs(errors).sum(1), weights.sum(1))

    def brier(self, weights_BN: Array) -> Array:
        weights = weights_BN[:, self._order]
        return ratio(weights @ (self._p - self._y) ** 2, weights.sum(1))


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
