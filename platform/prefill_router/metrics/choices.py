"""Metrics of a router's choices: target shares, agreement zones and the risk-coverage curve."""

# N prompts, T targets, B weightings

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.metrics.discrimination import once, ratio

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Zones:
    """Fractions of the complete prompts, by whether the targets agree."""

    all_right: float
    disagree: float  # targets differ: only on these prompts does the choice matter
    all_wrong: float
    wrong_choices: float  # mean shortfall from the best target on the prompts where targets disagree


def routing_shares(choice: ArrayLike, num_targets: int) -> Array:
    """The fraction of prompts (T,) routed to each target, from choices (N,) as returned by `policy.choose`."""
    chosen = np.asarray(choice, np.int64)
    return ratio(np.bincount(chosen[chosen >= 0], minlength=num_targets), float(len(chosen)))


def agreement_zones(correct: ArrayLike, choice: ArrayLike) -> Zones:
    """The zones of outcomes (N, T) and choices (N,), where -1 means no target. Incomplete prompts are left out.

    A choice is wrong if another target is right; with partial credit, it counts by its shortfall from the best target.
    Where all targets agree, every choice is equally good, so accuracy over all prompts hides the router's effect.
    """
    outcomes = np.asarray(correct, np.float64)
    is_complete = ~np.isnan(outcomes).any(1)
    outcomes, chosen = outcomes[is_complete], np.asarray(choice, np.int64)[is_complete]
    achieved = np.where(chosen >= 0, np.take_along_axis(outcomes, chosen[:, None], 1)[:, 0], 0.0)
    all_right, disagree, all_wrong, shortfall = ratio(zone_terms(outcomes, achieved).sum(1), float(len(outcomes)))
    return Zones(float(all_right), float(disagree), float(all_wrong), float(ratio(shortfall, disagree)))


def zone_terms(correct_NT: Array, achieved_N: Array) -> Array:
    """Rows (4, N): membership in each of the three zones, and the choice's shortfall where targets disagree."""
    best, worst = correct_NT.max(1), correct_NT.min(1)
    disagree = best > worst
    right = ~disagree & (best >= 0.5)
    return np.stack([right, disagree, ~disagree & ~right, np.where(disagree, best - achieved_N, 0.0)]).astype(
        np.float64
    )


def risk_coverage_curve(correct: ArrayLike, confidence: ArrayLike) -> Array:
    """Rows (coverage, risk): risk is the share of wrong answers among the most confident `coverage` of the prompts.

    `correct` (N,) are the outcomes of the chosen targets, `confidence` (N,) their P(correct). There is one row for each
    distinct confidence, highest first. Source: El-Yaniv and Wiener (2010); Geifman and El-Yaniv (2017).
    """
    risk = RiskCoverage(correct, confidence)
    return np.column_stack([values[0, risk.last] for values in risk.curve(once(correct))])


class RiskCoverage:
    """Risk-coverage curves for many weightings of the same prompts."""

    def __init__(self, correct: ArrayLike, confidence: ArrayLike) -> None:
        scores = np.asarray(confidence, np.float64)
        self._order = np.argsort(-scores, kind="stable")
        self._wrong = 1.0 - np.asarray(correct, np.float64)[self._order]
        _, counts = np.unique(-scores, return_counts=True)
        self._group = np.repeat(np.arange(len(counts)), counts)
        self.last = np.cumsum(counts) - 1  # position of the last prompt with each distinct confidence

    def curve(self, weights_BN: Array) -> tuple[Array, Array]:
        """Coverage and risk (B, N). Prompts of equal confidence share their mean risk: their order is arbitrary."""
        weights = weights_BN[:, self._order]
        covered, wrong = (np.cumsum(values, axis=1) for values in (weights, weights * self._wrong))
        # Totals at the edges of the groups of equal confidence, (B, groups + 1).
        covered_edges, wrong_edges = (np.pad(total[:, self.last], ((0, 0), (1, 0))) for total in (covered, wrong))
        group_risk = np.nan_to_num(ratio(np.diff(wrong_edges), np.diff(covered_edges)))[:, self._group]
        expected = wrong_edges[:, self._group] + (covered - covered_edges[:, self._group]) * group_risk
        return ratio(covered, covered[:, -1:]), ratio(expected, covered)

    def area(self, weights_BN: Array) -> Array:
        """AURC (B,): the mean risk over all coverages (Geifman, Uziel and El-Yaniv, 2019)."""
        _, risk = self.curve(weights_BN)
        weights = weights_BN[:, self._order]
        return ratio((weights * np.nan_to_num(risk)).sum(1), weights.sum(1))
