"""Calibration: of the answers predicted with P(correct) = 0.7, 70 % should be correct.

Each target gets a strictly increasing map between logits, which keeps the order of prompts. Cross-validated log loss
picks one of four kinds: identity, temperature (Guo et al., 2017), scale and bias (Platt, 1999) and isotonic regression
(Zadrozny and Elkan, 2002). Every kind is stored as knots of a piecewise linear map, extrapolated at both ends.
"""

# N prompts, T targets, Q knots, B bins

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

Kind = Literal["none", "identity", "temperature", "platt", "isotonic"]  # none: too few outcomes to calibrate
KINDS: tuple[Kind, ...] = get_args(Kind)

MIN_OUTCOMES = 10  # correct ones, and wrong ones, that a target needs
_MAX_BINS, _MIN_BIN_OUTCOMES = 16, 30
_MIN_SLOPE = 0.01  # keeps predictions distinct even for an unpredictable target: with ties, only prices would route
_MAX_LOGIT = 13.8  # P(correct) between 1e-6 and 1 - 1e-6
_RIDGE = 1e-6  # per prompt; makes the fit unique if all predictions are equal
_MAX_STEPS, _SMALL_STEP = 50, 1e-9


class Knots(NamedTuple):
    """Logits before calibration `x` (Q,) and after it `y` (Q,), both strictly increasing, Q >= 2."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Calibration:
    """Maps P(correct) (N, T) to calibrated P(correct) (N, T)."""

    kinds: tuple[Kind, ...]  # (T,)
    x: Array  # (T, Q) logits before
    y: Array  # (T, Q) logits after

    @classmethod
    def identity(cls, num_targets: int) -> Calibration:
        """Returns a calibration that leaves P(correct) unchanged."""
        return cls.of([("none", _line(1.0, 0.0))] * num_targets)

    @classmethod
    def of(cls, targets: list[tuple[Kind, Knots]]) -> Calibration:
        """Builds a calibration from each target's kind and knots; numbers of knots may differ."""
        size = max((len(knots.x) for _, knots in targets), default=2)
        padded = [_padded(knots, size) for _, knots in targets]
        shape = (len(targets), size)
        return cls(
            tuple(kind for kind, _ in targets),
            np.reshape([knots.x for knots in padded], shape),
            np.reshape([knots.y for knots in padded], shape),
        )

    def of_targets(self, targets: Sequence[int]) -> Calibration:
        """Returns the calibration of some targets, by index."""
        own = list(targets)
        return Calibration(tuple(self.kinds[t] for t in own), self.x[own], self.y[own])

    def with_more(self, num_targets: int) -> Calibration:
        """Adds targets whose P(correct) is left unchanged."""
        targets = [(kind, Knots(x, y)) for kind, x, y in zip(self.kinds, self.x, self.y, strict=True)]
        return Calibration.of(targets + [("none", _line(1.0, 0.0))] * num_targets)

    def __call__(self, p_correct: NDArray[Any]) -> NDArray[np.float32]:
        """Calibrates P(correct) (N, T); results are strictly between 0 and 1, except for unchanged targets."""
        logits = np.clip(_interpolate(_logit(p_correct), self.x, self.y), -_MAX_LOGIT, _MAX_LOGIT)
        return np.where(self._is_unchanged, p_correct, _sigmoid(logits)).astype(np.float32)

    @cached_property
    def _is_unchanged(self) -> NDArray[np.bool_]:
        return np.array([kind in ("none", "identity") for kind in self.kinds], bool)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays that an artifact stores."""
        codes = [KINDS.index(kind) for kind in self.kinds]
        return {"kinds": np.array(codes, np.uint8), "x": self.x, "y": self.y}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Calibration:
        """Reads the arrays of `tensors`. Raises KeyError if one is missing, ValueError if one is invalid."""
        codes, x, y = tensors["kinds"], tensors["x"], tensors["y"]
        if codes.ndim != 1 or x.ndim != 2 or x.shape != y.shape or len(x) != len(codes) or x.shape[1] < 2:
            raise ValueError(
                f"calibration: kinds {codes.shape}, x {x.shape} and y {y.shape} must be (T,), (T, Q), (T, Q)"
            )
        if not all(np.isfinite(knots).all() and (np.diff(knots) > 0.0).all() for knots in (x, y)):
            raise ValueError("calibration: x and y must be finite and strictly increasing")
        if codes.dtype != np.uint8 or (codes >= len(KINDS)).any():
            raise ValueError(f"calibration: kinds = {codes.tolist()}, must be uint8 below {len(KINDS)}")
        return cls(tuple(KINDS[code] for code in codes), x.astype(np.float64), y.astype(np.float64))


def fit_calibration(p_correct: ArrayLike, correct: ArrayLike, num_folds: int = 5, seed: int = 0) -> Calibration:
    """Fits the calibration of predictions `p_correct` (N, T), for prompts that the trunk was not fitted on.

    `correct` (N, T) is in [0, 1], NaN where missing. A kind with more parameters is picked only if its cross-validated
    log loss is lower by more than one standard error of the difference. Raises ValueError for mismatched shapes, a NaN
    in `p_correct`, or fewer than two folds.
    """
    p_NT, correct_NT = np.asarray(p_correct, np.float64), np.asarray(correct, np.float64)
    if p_NT.ndim != 2 or p_NT.shape != correct_NT.shape:
        raise ValueError(f"p_correct {p_NT.shape} and correct {correct_NT.shape} must both be (prompts, targets)")
    if np.isnan(p_NT).any():
        raise ValueError("p_correct must not be NaN")
    if num_folds < 2:
        raise ValueError(f"num_folds = {num_folds}, must be >= 2")
    folds = np.random.default_rng(seed).permutation(len(p_NT)) % num_folds
    logits, graded = _logit(p_NT), ~np.isnan(correct_NT)
    return Calibration.of(
        [_fit_target(logits[rows, t], correct_NT[rows, t], folds[rows]) for t, rows in enumerate(graded.T)]
    )


def _fit_target(x: Array, y: Array, folds: NDArray[Any]) -> tuple[Kind, Knots]:
    if min(y.sum(), (1.0 - y).sum()) < MIN_OUTCOMES:
        return "none", _line(1.0, 0.0)
    best: Kind = "identity"
    best_losses = _log_losses(x, y)
    for kind, fit in _FITS.items():
        losses = np.empty_like(x)
        for fold in np.unique(folds):
            out = folds == fold
            knots = fit(x[~out], y[~out])
            losses[out] = _log_losses(_interpolate(x[out, None], knots.x[None], knots.y[None])[:, 0], y[out])
        gains = best_losses - losses
        if gains.mean() > gains.std() / np.sqrt(len(gains)):
            best, best_losses = kind, losses
    return best, _line(1.0, 0.0) if best == "identity" else _FITS[best](x, y)


# --- the kinds ---------------------------------------------------------------------------------------------------


def fit_temperature(x: Array, y: Array) -> Knots:
    """Fits outcomes (N,) to logits (N,) divided by a temperature."""
    (scale,) = _logistic(x[:, None], _smoothed(y), np.zeros_like(x))
    return _line(max(scale, _MIN_SLOPE), 0.0)


def fit_platt(x: Array, y: Array) -> Knots:
    """Fits outcomes (N,) to logits (N,) times a positive scale, plus a bias."""
    labels, ones = _smoothed(y), np.ones_like(x)
    scale, bias = _logistic(np.column_stack([x, ones]), labels, np.zeros_like(x))
    if scale < _MIN_SLOPE:
        scale, (bias,) = _MIN_SLOPE, _logistic(ones[:, None], labels, _MIN_SLOPE * x)
    return _line(scale, bias)


def fit_isotonic(x: Array, y: Array) -> Knots:
    """Fits isotonic regression of outcomes (N,) on logits (N,), over bins with equal numbers of prompts.

    Each pooled block has a knot at its mean. Lines between knots replace the usual steps, whose plateaus would tie
    prompts that the trunk distinguishes. Beyond the outer blocks, the map has the slope of Platt scaling.
    """
    from sklearn.isotonic import isotonic_regression  # here, so that workers do not import scikit-learn

    num_bins = max(1, min(_MAX_BINS, len(x) // _MIN_BIN_OUTCOMES))
    edges = np.unique(np.quantile(x, np.linspace(0.0, 1.0, num_bins + 1)[1:-1]))
    bins = np.searchsorted(edges, x, side="right")
    counts = np.bincount(bins).astype(np.float64)
    filled = counts > 0
    counts = counts[filled]
    shares = (np.bincount(bins, y)[filled] + 0.5) / (counts + 1.0)
    levels, block = np.unique(isotonic_regression(shares, sample_weight=counts), return_inverse=True)
    centres = np.bincount(block, np.bincount(bins, x)[filled]) / np.bincount(block, counts)
    tilt = _MIN_SLOPE * centres
    logits = np.maximum.accumulate(_logit(levels) - tilt) + tilt
    platt = fit_platt(x, y)
    slope = (platt.y[-1] - platt.y[0]) / (platt.x[-1] - platt.x[0])
    return Knots(
        np.concatenate([[centres[0] - 1.0], centres, [centres[-1] + 1.0]]),
        np.concatenate([[logits[0] - slope], logits, [logits[-1] + slope]]),
    )


_FITS: dict[Kind, Callable[[Array, Array], Knots]] = {
    "temperature": fit_temperature,
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}


def _smoothed(y: Array) -> Array:
    """Applies Platt's label smoothing, which keeps the fit of separable outcomes finite."""
    num_correct, num_wrong = y.sum(), (1.0 - y).sum()
    return np.asarray(y * (num_correct + 1.0) / (num_correct + 2.0) + (1.0 - y) / (num_wrong + 2.0))


def _logistic(design: Array, y: Array, offset: Array) -> Array:
    """Fits the logistic regression of `y` (N,) on `design` (N, C) by Newton's method with step halving."""
    ridge = _RIDGE * len(y)

    def loss(at: Array) -> float:
        return float(_log_losses(offset + design @ at, y).sum() + ridge / 2.0 * (at @ at))

    beta = np.zeros(design.shape[1])
    for _ in range(_MAX_STEPS):
        p = _sigmoid(offset + design @ beta)
        hessian = (design.T * (p * (1.0 - p))) @ design + ridge * np.eye(len(beta))
        step = np.linalg.solve(hessian, design.T @ (p - y) + ridge * beta)
        if np.abs(step).max() < _SMALL_STEP:
            break
        while loss(beta - step) > loss(beta):
            step = step / 2.0
        beta = beta - step
    return beta


# --- knots and logits --------------------------------------------------------------------------------------------


def _line(scale: float, bias: float) -> Knots:
    x = np.array([-1.0, 1.0])
    return Knots(x, scale * x + bias)


def _padded(knots: Knots, size: int) -> Knots:
    """Extends the last linear piece by further knots, up to `size` in all."""
    further = np.arange(1.0, size - len(knots.x) + 1.0)
    slope = (knots.y[-1] - knots.y[-2]) / (knots.x[-1] - knots.x[-2])
    return Knots(np.append(knots.x, knots.x[-1] + further), np.append(knots.y, knots.y[-1] + slope * further))


def _interpolate(logits: Array, x: Array, y: Array) -> Array:
    """Maps logits (N, T) by the linear pieces between knots `x` and `y`, each (T, Q)."""
    piece = (logits[..., None] >= x[:, 1:-1]).sum(-1)
    target = np.arange(len(x))
    left, low = x[target, piece], y[target, piece]
    slope = (y[target, piece + 1] - low) / (x[target, piece + 1] - left)
    return np.asarray(low + slope * (logits - left))


def _logit(p: NDArray[Any]) -> Array:
    wide = np.asarray(p, np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(np.log(wide) - np.log1p(-wide), -_MAX_LOGIT, _MAX_LOGIT))


def _sigmoid(logits: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))


def _log_losses(logits: Array, y: Array) -> Array:
    return np.asarray(np.logaddexp(0.0, logits) - y * logits)
