"""Layer probes: how well a layer's activations tell right answers from wrong ones, without training anything.

Fisher J ranks the layers for a target; d_eff is the diagnostic beside it. Source: METHOD, "Layer probes".
"""

# N prompts, D hidden size, T targets

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from prefill_router.errors import UserError
from prefill_router.moments import Array, ClassMoments, Moments, class_moments
from prefill_router.schema import ActivationColumn

SHRINKAGE = 0.1
_ROUNDING = 1e-12


def effective_dimensionality(x: ArrayLike) -> float:
    """d_eff = tr(C)^2 / tr(C^2) of the covariance C of `x` (N, D): 1 for a line, D for a sphere, 0 for a point."""
    return d_eff(Moments.of(np.asarray(x)).covariance)


def d_eff(covariance: Array) -> float:
    square = float(np.sum(covariance * covariance))  # tr(C^2), C being symmetric
    return float(np.trace(covariance)) ** 2 / square if square else 0.0


def fisher_separability(x: ArrayLike, y: ArrayLike, shrinkage: float = SHRINKAGE) -> float:
    """Fisher J = p1 p0 (m1 - m0)^T S_w^-1 (m1 - m0) of activations `x` (N, D) and outcomes `y` (N,) in [0, 1].

    S_w, the within-class scatter p1 Cov(X|1) + p0 Cov(X|0) with population covariances, is regularised to
    (1 - shrinkage) S_w + shrinkage diag(S_w): towards uncorrelated dimensions, each at its own scale. NaN in `y` marks
    a missing outcome. J is biased upwards by about D / N; `Fisher.corrected` is not. NaN where one class is empty.
    """
    moments = class_moments(np.asarray(x), np.asarray(y)[:, None])[0]
    return fisher(moments, shrinkage).j


@dataclass(frozen=True)
class Fisher:
    """Fisher J as defined, and with its small-sample bias removed."""

    j: float
    corrected: float


def fisher(moments: ClassMoments, shrinkage: float = SHRINKAGE) -> Fisher:
    """Fisher J from sums.

    The correction inverts E[J] = (d + N J_true) / (N - d - 3), the mean of the two-sample Hotelling statistic under
    Gaussian classes, with d = tr(S_w (S_w regularised)^-1), the dimensions that the shrinkage leaves.
    """
    p1, n = moments.share_correct, moments.graded.count
    if not 0.0 < p1 < 1.0:
        return Fisher(float("nan"), float("nan"))
    within, delta = moments.within_covariance, moments.mean_difference
    spread = np.diag(moments.graded.covariance)
    # What rounding leaves of a dimension that never varies separates nothing; one that separates the classes
    # perfectly has no scatter within them, and keeps a sliver.
    is_constant = spread <= (_ROUNDING * moments.graded.mean) ** 2
    scale = np.where(is_constant, 1.0, np.sqrt(np.maximum(np.diag(within), _ROUNDING * spread)))
    delta = np.where(is_constant, 0.0, delta)
    correlation = within / np.outer(scale, scale)
    regularised = (1.0 - shrinkage) * correlation + shrinkage * np.eye(len(scale))
    try:
        inverse = _inverse(regularised)
    except RuntimeError:  # torch's LinAlgError
        raise UserError(
            f"the within-class scatter of {n:.0f} prompts in {len(scale)} dimensions is singular: shrink it more"
        ) from None
    difference = delta / scale
    j = p1 * (1.0 - p1) * float(difference @ inverse @ difference)
    dimensions = float(np.sum(inverse * correlation))  # tr(S_w S_w'^-1), both symmetric
    return Fisher(j, ((n - dimensions - 3.0) * j - dimensions) / n)


def _inverse(matrix: Array) -> Array:
    """The inverse of a positive definite matrix. Raises RuntimeError where it is none."""
    return np.asarray(torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(matrix))))


@dataclass(frozen=True)
class LayerProbe:
    """One row of the probe's table: a column of the store, seen by a target."""

    column: ActivationColumn
    target: str
    d_eff: float
    fisher_j: float
    fisher_j_corrected: float
    num_prompts: int
    share_correct: float


def probe_column(column: ActivationColumn, targets: Sequence[str], moments: Sequence[ClassMoments]) -> list[LayerProbe]:
    """The probes of one column for every target, from its class moments."""
    rows = []
    for target, m in zip(targets, moments, strict=True):
        j = fisher(m)
        dimensionality = d_eff(m.graded.covariance) if m.graded.count else float("nan")
        rows.append(LayerProbe(column, target, dimensionality, j.j, j.corrected, int(m.graded.count), m.share_correct))
    return rows


def choose_columns(probes: Iterable[LayerProbe]) -> dict[str, ActivationColumn]:
    """The column of each target: the highest bias-corrected J, the shallower layer at a tie.

    Raises UserError for a target whose graded prompts are all right or all wrong: nothing separates them.
    """
    best: dict[str, LayerProbe] = {}
    targets = []
    for probe in sorted(probes, key=lambda p: (p.column.layer, p.column.pooling)):
        targets.append(probe.target)
        held = best.get(probe.target)
        if np.isfinite(probe.fisher_j_corrected) and (
            held is None or probe.fisher_j_corrected > held.fisher_j_corrected
        ):
            best[probe.target] = probe
    for target in targets:
        if target not in best:
            raise UserError(f'target "{target}": its graded answers are all right or all wrong, so no layer tells them')
    return {target: probe.column for target, probe in best.items()}
