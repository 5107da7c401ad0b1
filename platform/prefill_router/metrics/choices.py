"""What a router's choices come to: whom they go to, where they go wrong, and whether it knows."""

# N prompts, T targets, B weightings

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.metrics.discrimination import once, ratio

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Zones:
    """Where the choice matters. Fractions of the prompts on which every target has an outcome."""

    all_right: float
    disagree: float  # some are right and some wrong: the only prompts on which a router can do well or badly
    all_wrong: float
    wrong_choices: float  # of those that disagree: what the choice fell short of the best target there


def routing_shares(choice: ArrayLike, num_targets: int) -> Array:
    """The fraction of prompts (T,) that each target gets, of choices (N,) as `policy.choose` gives them."""
    chosen = np.asarray(choice, np.int64)
    return ratio(np.bincount(chosen[chosen >= 0], minlength=num_targets), float(len(chosen)))


def agreement_zones(correct: ArrayLike, choice: ArrayLike) -> Zones:
    """Zones of outcomes (N, T) and choices (N,), -1 for no target. Prompts on which an outcome is missing do not count.

    A choice is wrong where another target would have been right; with partial credit, as far as it fell short of the
    best. On all other prompts every choice is as good: accuracy over all of them hides what a router does.
    """
    outcomes = np.asarray(correct, np.float64)
    has_all = ~np.isnan(outcomes).any(1)
    outcomes, chosen = outcomes[has_all], np.asarray(choice, np.int64)[has_all]
    reached = np.where(chosen >= 0, np.take_along_axis(outcomes, chosen[:, None], 1)[:, 0], 0.0)
    all_right, disagree, all_wrong, short = ratio(zone_terms(outcomes, reached).sum(1), float(len(outcomes)))
    return Zones(float(all_right), float(disagree), float(all_wrong), float(ratio(short, disagree)))


def zone_terms(correct_NT: Array, reached_N: Array) -> Array:
    """Rows (4, N): is the prompt in each zone, and what its choice fell short of the best where targets disagree."""
    best, worst = correct_NT.max(1), correct_NT.min(1)
    disagree = best > worst
    right = ~disagree & (best >= 0.5)
    return np.stack([right, disagree, ~disagree & ~right, np.where(disagree, best - reached_N, 0.0)]).astype(np.float64)


def risk_coverage_curve(correct: ArrayLike, confidence: ArrayLike) -> Array:
    """Rows (coverage, risk): the share of wrong answers among the most confident share of prompts.

    `correct` (N,) is of the chosen targets and `confidence` (N,) their P(correct). A row for each distinct confidence,
    highest first. Source: El-Yaniv and Wiener (2010); Geifman and El-Yaniv (2017).
    """
    risk = RiskCoverage(correct, confidence)
    return np.column_stack([values[0, risk.last] for values in risk.curve(once(correct))])


class RiskCoverage:
    """The risk at each coverage, for many weightings of the prompts."""

    def __init__(self, correct: ArrayLike, confidence: ArrayLike) -> None:
        scores = np.asarray(confidence, np.float64)
        self._order = np.argsort(-scores, kind="stable")
        self._wrong = 1.0 - np.asarray(correct, np.float64)[self._order]
        _, counts = np.unique(-scores, return_counts=True)
        self._group = np.repeat(np.arange(len(counts)), counts)
        self.last = np.cumsum(counts) - 1  # of each distinct confidence

    def curve(self, weights_BN: Array) -> tuple[Array, Array]:
        """Coverage and risk (B, N). Prompts of equal confidence come in any order: each bears their mean risk."""
        weights = weights_BN[:, self._order]
        covered = np.cumsum(weights, axis=1)
        wrong = np.cumsum(weights * self._wrong, axis=1)
        ends = [
            np.concatenate([np.zeros((len(weights), 1)), total[:, self.last]], axis=1) for total in (covered, wrong)
        ]
        before, mean = (ends[1][:, self._group], ratio(*(np.diff(e, axis=1) for e in ends[::-1]))[:, self._group])
        expected = before + (covered - ends[0][:, self._group]) * np.nan_to_num(mean)
        return ratio(covered, covered[:, -1:]), ratio(expected, covered)

    def area(self, weights_BN: Array) -> Array:
        """The mean of the risk over all coverages (B,): AURC (Geifman, Uziel and El-Yaniv, 2019)."""
        _, risk = self.curve(weights_BN)
        weights = weights_BN[:, self._order]
        return ratio((weights * np.nan_to_num(risk)).sum(1), weights.sum(1))
