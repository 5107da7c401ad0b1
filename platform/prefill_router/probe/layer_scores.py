"""Scores of a layer: Fisher J ranks the layers for a target, d_eff (effective dimensionality) is a diagnostic.

Source: platform/METHOD.md, "Layer probes".
"""

# N prompts, D hidden size, T targets, F folds, C classes, B resamples

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.probe.moments import NUM_FOLDS, ROUNDING, ClassMoments, LabelledMoments, Moments

SHRINKAGE = 0.1
NUM_RESAMPLES = 400
CONFIDENCE = 0.95
DEPTH_TOLERANCE = 0.02

_NAN = float("nan")


def effective_dimensionality(x: ArrayLike) -> float:
    """Returns tr(C)^2 / tr(C^2) of the covariance C of `x` (N, D): 1 for a line, D for a sphere, 0 for a point."""
    return d_eff(Moments.of(x))


def d_eff(moments: Moments) -> float:
    trace, square = float(moments.scatter.trace()), float(moments.scatter.square().sum())  # tr(C^2), as C is symmetric
    return trace**2 / square if square else 0.0


def fisher_separability(x: ArrayLike, y: ArrayLike, shrinkage: float = SHRINKAGE) -> float:
    """Returns J = p1 p0 (m1 - m0)^T S_w^-1 (m1 - m0) of activations `x` (N, D) and outcomes `y` (N,) in [0, 1].

    S_w is the within-class scatter p1 Cov(X|1) + p0 Cov(X|0), with population covariances. It is regularised to
    (1 - shrinkage) S_w + shrinkage diag(S_w), which shrinks correlations and keeps variances. NaN in `y` marks a
    missing outcome. J is biased upwards by up to D / N (`Fisher.corrected` is not), and NaN if a class is empty.
    """
    return fisher(LabelledMoments.of(x, np.asarray(y)[:, None]).target(0), shrinkage).j


@dataclass(frozen=True)
class Fisher:
    """Fisher J as defined, J corrected for its small-sample bias, and the interval around the corrected J."""

    j: float
    corrected: float
    low: float
    high: float


def fisher(moments: ClassMoments, shrinkage: float = SHRINKAGE) -> Fisher:
    """Computes Fisher J from sums. Raises UserError if the within-class scatter is singular.

    The correction inverts E[J] = (d + N J_true) / (N - d - 3), the mean of the two-sample Hotelling statistic for
    Gaussian classes, where d = tr(S_w (S_w regularised)^-1) is the effective number of dimensions after shrinkage.

    The interval is a bootstrap over the NUM_FOLDS folds of the prompts, with NUM_RESAMPLES fixed draws. Each resample
    gives J from its own class means and shares, with S_w held fixed. The middle 95 % of these J, minus their mean
    (resampling adds a bias), is centred on the corrected J. The interval is too wide if J is small relative to d / N.
    It is too narrow for a large J from few prompts, because the error of S_w is ignored: with J = 0.9, d = 10 and
    N = 200 it covers 89 %.
    """
    p1, n = moments.share_correct, moments.graded.count
    if not 0.0 < p1 < 1.0:
        return Fisher(_NAN, _NAN, _NAN, _NAN)
    scale, correlation = _within_correlation(moments)
    dimensions = float(correlation.trace())
    inverse = _inverse(correlation.mul_(1.0 - shrinkage), shrinkage, n)
    difference = moments.mean_difference / scale
    j = p1 * (1.0 - p1) * float(difference @ inverse @ difference)
    if shrinkage < 1.0:  # tr(R R'^-1), where R' = (1 - s) R + s I
        dimensions = (len(scale) - shrinkage * float(inverse.trace())) / (1.0 - shrinkage)
    unbiased = (n - dimensions - 3.0) / n
    corrected = _corrected(j, moments.relative_variance, unbiased, dimensions / n)
    low, high = _spread(moments, scale, inverse)
    return Fisher(j, corrected, corrected + unbiased * low, corrected + unbiased * high)


def _corrected(j: float, variance: float, unbiased: float, bias: float) -> float:
    """Removes the small-sample bias from J, for outcomes with this variance divided by p1 p0.

    The correction holds for R^2 / (1 - R^2) of the regression of outcomes on activations, which J is if every outcome
    is 0 or 1. In general J / (1 + J) is R^2 times the variance: outcomes between 0 and 1 vary less, as m1 - m0 does.
    """
    odds = unbiased * j / max(variance - (1.0 - variance) * j, ROUNDING) - bias
    return variance * odds / (1.0 + (1.0 - variance) * max(odds, 0.0))


def _within_correlation(moments: ClassMoments) -> tuple[Tensor, Tensor]:
    """Returns the within-class scale (D,) of each dimension, and the within-class correlation R (D, D).

    A constant dimension gets an infinite scale, so that its rounding errors separate nothing. A dimension that
    separates the classes perfectly has no within-class scatter; its scale is kept above zero.
    """
    within, spread = moments.within_covariance, moments.graded.covariance.diagonal()
    scale = torch.maximum(within.diagonal(), ROUNDING * spread).sqrt()
    scale[spread <= (ROUNDING * moments.graded.mean) ** 2] = torch.inf
    return scale, within.div_(scale).div_(scale[:, None])


def _inverse(shrunk: Tensor, shrinkage: float, num_prompts: float) -> Tensor:
    """Returns R'^-1 (D, D), where R' = `shrunk` + `shrinkage` I. Overwrites `shrunk`."""
    shrunk.diagonal().add_(shrinkage)
    root, info = torch.linalg.cholesky_ex(shrunk)
    if info:
        raise UserError(
            f"the within-class scatter of {num_prompts:.0f} prompts in {len(shrunk)} dimensions is singular: "
            "raise the shrinkage above 0"
        )
    return torch.cholesky_inverse(root)


def _spread(moments: ClassMoments, scale: Tensor, inverse: Tensor) -> tuple[float, float]:
    """Returns the quantiles of the resampled J relative to their mean; `inverse` is of the scaled correlation."""
    deviations_FCD = moments.sums_FCD - moments.counts_FC[..., None] * moments.graded.mean
    scaled = deviations_FCD.flatten(0, 1) / scale
    gram, counts_FC = (scaled @ inverse @ scaled.T).cpu().numpy(), moments.counts_FC.cpu().numpy()
    draws_BF = _draws()
    counts_BC = draws_BF @ counts_FC
    with np.errstate(divide="ignore", invalid="ignore"):  # a class may be missing from all drawn folds
        # m1 - m0 is a sum over folds and classes with these weights.
        weights_BFC = np.array([-1.0, 1.0]) * draws_BF[:, :, None] / counts_BC[:, None, :]
        weights_BI = weights_BFC.reshape(len(draws_BF), -1)
        shares = counts_BC.prod(1) / counts_BC.sum(1) ** 2
        j_B = shares * ((weights_BI @ gram) * weights_BI).sum(1)
    j_B = j_B[np.isfinite(j_B)]
    if not len(j_B):
        return _NAN, _NAN
    low, high = np.quantile(j_B, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0]) - j_B.mean()
    return float(low), float(high)


@functools.cache
def _draws() -> NDArray[np.int64]:
    """Returns how often each fold occurs in each resample (B, F)."""
    return np.random.default_rng(0).multinomial(NUM_FOLDS, np.full(NUM_FOLDS, 1.0 / NUM_FOLDS), NUM_RESAMPLES)


@dataclass(frozen=True)
class LayerProbe:
    """One row of the probe table: the scores of one activation column of an encoder for one target."""

    encoder: str
    column: ActivationColumn
    target: str
    d_eff: float
    fisher_j: float
    fisher_j_corrected: float
    fisher_j_low: float
    fisher_j_high: float
    num_prompts: int
    share_correct: float


def probe_column(
    encoder: str, column: ActivationColumn, targets: Sequence[str], moments: LabelledMoments
) -> list[LayerProbe]:
    """Returns the probes of one column, one for each target."""
    dimensionality = [d_eff(group) if group.count else _NAN for group in moments.groups]
    rows = []
    for t, target in enumerate(targets):
        of_target = moments.target(t)
        j = fisher(of_target)
        rows.append(
            LayerProbe(
                encoder,
                column,
                target,
                dimensionality[moments.group_of[t]],
                j.j,
                j.corrected,
                j.low,
                j.high,
                int(of_target.graded.count),
                of_target.share_correct,
            )
        )
    return rows


# --- choice -------------------------------------------------------------------------------------------------------


def choose(probes: Iterable[LayerProbe]) -> dict[str, LayerProbe]:
    """Picks each target's encoder and column: the highest bias-corrected J; a tie goes to the shallower layer.

    Raises UserError for a target whose graded answers are all correct or all wrong.
    """
    ordered = sorted(probes, key=lambda p: (p.column.layer, p.column.pooling))
    best: dict[str, LayerProbe] = {}
    for probe in ordered:
        j = probe.fisher_j_corrected
        if np.isfinite(j) and (probe.target not in best or j > best[probe.target].fisher_j_corrected):
            best[probe.target] = probe
    for probe in ordered:
        if probe.target not in best:
            raise UserError(
                f'target "{probe.target}": its graded answers are all correct or all wrong, so no layer can separate '
                "them: grade more prompts, or take the target out of the pool"
            )
    return best


def choose_columns(probes: Iterable[LayerProbe]) -> dict[str, ActivationColumn]:
    """Picks each target's column from the probes of one encoder. Raises UserError as `choose` does."""
    return {target: probe.column for target, probe in choose(probes).items()}


def joint_columns(probes: Sequence[LayerProbe], depth_tolerance: float = DEPTH_TOLERANCE) -> list[ActivationColumn]:
    """Picks columns for all targets, one for each encoder and pooling. Raises UserError as `choose` does.

    A column's score is its corrected J, clipped at 0, averaged over targets. Of each, the shallowest column whose
    score is within the share `depth_tolerance` of the best is picked, because the deepest layer sets the serving cost.
    Different poolings carry different information; different layers of one pooling hardly do.
    """
    targets = list(choose(probes))
    scores = dict.fromkeys(sorted({p.column for p in probes}, key=lambda c: c.layer), 0.0)
    for p in probes:
        scores[p.column] += max(np.nan_to_num(p.fisher_j_corrected), 0.0) / len(targets)
    columns = []
    for kind in sorted({(column.pooling, column.encoder) for column in scores}):
        own = {column: score for column, score in scores.items() if (column.pooling, column.encoder) == kind}
        least = (1.0 - depth_tolerance) * max(own.values())
        columns.append(next(column for column, score in own.items() if score >= least))
    return columns


def by_encoder(probes: Iterable[LayerProbe]) -> dict[str, list[LayerProbe]]:
    """Groups probes by encoder, in their order."""
    result: dict[str, list[LayerProbe]] = {}
    for probe in probes:
        result.setdefault(probe.encoder, []).append(probe)
    return result


def coverage(probes: Sequence[LayerProbe], columns: Sequence[ActivationColumn]) -> float:
    """Returns the best corrected J among `columns`, averaged over targets, as a share of the best over all columns."""
    best, among = choose(probes), choose(p for p in probes if p.column in set(columns))
    total = sum(max(p.fisher_j_corrected, 0.0) for p in best.values())
    return sum(max(p.fisher_j_corrected, 0.0) for p in among.values()) / total if total else 1.0
