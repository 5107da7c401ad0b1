"""Layer probes: how well a layer's activations tell right answers from wrong ones, without training anything.

Fisher J ranks the layers for a target; d_eff is the diagnostic beside it. Source: METHOD, "Layer probes".
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
    """d_eff = tr(C)^2 / tr(C^2) of the covariance C of `x` (N, D): 1 for a line, D for a sphere, 0 for a point."""
    return d_eff(Moments.of(x))


def d_eff(moments: Moments) -> float:
    trace, square = float(moments.scatter.trace()), float(moments.scatter.square().sum())  # tr(C^2), C being symmetric
    return trace**2 / square if square else 0.0


def fisher_separability(x: ArrayLike, y: ArrayLike, shrinkage: float = SHRINKAGE) -> float:
    """Fisher J = p1 p0 (m1 - m0)^T S_w^-1 (m1 - m0) of activations `x` (N, D) and outcomes `y` (N,) in [0, 1].

    S_w, the within-class scatter p1 Cov(X|1) + p0 Cov(X|0) with population covariances, is regularised to
    (1 - shrinkage) S_w + shrinkage diag(S_w): towards uncorrelated dimensions, each at its own scale. NaN in `y` marks
    a missing outcome. J is biased upwards by about D / N; `Fisher.corrected` is not. NaN where one class is empty.
    """
    return fisher(LabelledMoments.of(x, np.asarray(y)[:, None]).target(0), shrinkage).j


@dataclass(frozen=True)
class Fisher:
    """Fisher J as defined, with its small-sample bias removed, and the interval around the latter."""

    j: float
    corrected: float
    low: float
    high: float


def fisher(moments: ClassMoments, shrinkage: float = SHRINKAGE) -> Fisher:
    """Fisher J from sums. Raises UserError where the within-class scatter is singular.

    The correction inverts E[J] = (d + N J_true) / (N - d - 3), the mean of the two-sample Hotelling statistic under
    Gaussian classes, with d = tr(S_w (S_w regularised)^-1), the dimensions that the shrinkage leaves.

    The interval is a bootstrap over the folds of the prompts: NUM_RESAMPLES times as many folds are drawn with
    replacement, always the same draws, and give J of their class means and shares, S_w held fixed. What holds the
    middle 95 % of these J, less their mean, is laid around the corrected J; for resampling adds a bias of its own. It
    errs on the wide side where J is small beside d / N; and on the narrow one, for S_w's own error is left out, where a
    large J is told from few prompts: with J = 0.9, d = 10 and N = 200 it holds 89 %.
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
    corrected = unbiased * j - dimensions / n
    low, high = _spread(moments, scale, inverse)
    return Fisher(j, corrected, corrected + unbiased * low, corrected + unbiased * high)


def _within_correlation(moments: ClassMoments) -> tuple[Tensor, Tensor]:
    """The scale (D,) of each dimension within the classes, and their correlation R (D, D) there.

    What rounding leaves of a dimension that never varies separates nothing: its scale is infinite. One that separates
    the classes perfectly has no scatter within them, and keeps a sliver.
    """
    within, spread = moments.within_covariance, moments.graded.covariance.diagonal()
    scale = torch.maximum(within.diagonal(), ROUNDING * spread).sqrt()
    scale[spread <= (ROUNDING * moments.graded.mean) ** 2] = torch.inf
    return scale, within.div_(scale).div_(scale[:, None])


def _inverse(shrunk: Tensor, shrinkage: float, num_prompts: float) -> Tensor:
    """R'^-1 (D, D), where R' = `shrunk` + `shrinkage` I; `shrunk` is not kept."""
    shrunk.diagonal().add_(shrinkage)
    root, info = torch.linalg.cholesky_ex(shrunk)
    if info:
        raise UserError(
            f"the within-class scatter of {num_prompts:.0f} prompts in {len(shrunk)} dimensions is singular: "
            "shrink it more"
        )
    return torch.cholesky_inverse(root)


def _spread(moments: ClassMoments, scale: Tensor, inverse: Tensor) -> tuple[float, float]:
    """The quantiles of resampled J about their mean; `inverse` is that of the scaled correlation."""
    deviations_FCD = moments.sums_FCD - moments.counts_FC[..., None] * moments.graded.mean
    scaled = deviations_FCD.flatten(0, 1) / scale
    gram, counts_FC = (scaled @ inverse @ scaled.T).cpu().numpy(), moments.counts_FC.cpu().numpy()
    draws_BF = _draws()
    counts_BC = draws_BF @ counts_FC
    with np.errstate(divide="ignore", invalid="ignore"):  # of a class that no drawn fold holds
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
    """How often each fold is in each resample (B, F)."""
    return np.random.default_rng(0).multinomial(NUM_FOLDS, np.full(NUM_FOLDS, 1.0 / NUM_FOLDS), NUM_RESAMPLES)


@dataclass(frozen=True)
class LayerProbe:
    """One row of the probe's table: a column of an encoder's store, seen by a target."""

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
    """The probes of one column for every target."""
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
    """The encoder and column of each target: the highest bias-corrected J, the shallower layer at a tie.

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
    return best


def choose_columns(probes: Iterable[LayerProbe]) -> dict[str, ActivationColumn]:
    """The column of each target, where the probes are of one encoder. Raises what `choose` raises."""
    return {target: probe.column for target, probe in choose(probes).items()}


def joint_columns(probes: Sequence[LayerProbe], depth_tolerance: float = DEPTH_TOLERANCE) -> list[ActivationColumn]:
    """The columns of one encoder that serve all targets: one of each pooling. Raises what `choose` raises.

    Of a pooling, the shallowest whose corrected J, at least 0 and the mean over targets, is within `depth_tolerance`, a
    share, of the best: serving pays for the deepest. Two poolings say different things of a prompt, two layers of one
    pooling hardly do.
    """
    targets = list(choose(probes))
    scores = dict.fromkeys(sorted({p.column for p in probes}, key=lambda c: c.layer), 0.0)
    for p in probes:
        scores[p.column] += max(np.nan_to_num(p.fisher_j_corrected), 0.0) / len(targets)
    columns = []
    for pooling in sorted({column.pooling for column in scores}):
        own = {column: score for column, score in scores.items() if column.pooling == pooling}
        least = (1.0 - depth_tolerance) * max(own.values())
        columns.append(next(column for column, score in own.items() if score >= least))
    return columns


def by_encoder(probes: Iterable[LayerProbe]) -> dict[str, list[LayerProbe]]:
    """The probes of each encoder, in their order."""
    result: dict[str, list[LayerProbe]] = {}
    for probe in probes:
        result.setdefault(probe.encoder, []).append(probe)
    return result


def coverage(probes: Sequence[LayerProbe], columns: Sequence[ActivationColumn]) -> float:
    """The mean over targets of the best corrected J among `columns` of one encoder, as a share of the best of all."""
    best, among = choose(probes), choose(p for p in probes if p.column in set(columns))
    total = sum(max(p.fisher_j_corrected, 0.0) for p in best.values())
    return sum(max(p.fisher_j_corrected, 0.0) for p in among.values()) / total if total else 1.0
