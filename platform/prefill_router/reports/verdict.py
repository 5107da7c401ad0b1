"""The verdict of an evaluation: which tolerance to set and what it saves, or that the data cannot tell."""

from __future__ import annotations

from math import ceil, isfinite
from typing import NamedTuple

from prefill_router.common.money import usd
from prefill_router.evaluation.results import Evaluation, OperatingPoint
from prefill_router.metrics import ENOUGH_VALIDATION
from prefill_router.reports.number_format import exactly, in_words, shown

_LOSS = 0.05  # of accuracy, which the held-out prompts must be able to rule out
_UNKNOWN = "Intervals are for prompts of the same kind: what other prompts, targets or prices bring is not known."


class Recommendation(NamedTuple):
    decision: str  # a sentence that names the tolerance to set and what it saves, with intervals
    evidence: str  # what it rests on, and what is not known
    tolerance: float | None = None  # to serve with; None if the router is not shown to pay

    def __str__(self) -> str:
        return f"{self.decision} {self.evidence}"


def verdict(evaluation: Evaluation) -> Recommendation:
    """The tolerance to set and what it saves; where the data cannot tell, what would be enough."""
    own = evaluation.operating_points[0]
    if too_few := _too_few(evaluation, own):
        return too_few
    as_good = [point for point in evaluation.operating_points[1:] if point.title.endswith("of the best single target")]
    point = next((point for point in (own, *as_good) if _saves_at_no_loss(point)), own)
    tolerance: float | None = point.tolerance
    if _saves_at_no_loss(point):
        decision = _saves(evaluation, point)
    elif own.accuracy_less_best_single.low > 0.0:
        decision = _improves(evaluation, own)
    elif own.saved_usd.low > 0.0 and own.accuracy_less_best_single.high < 0.0:
        decision = _trades(evaluation, own)
    else:
        decision, tolerance = _does_not_pay(evaluation, own), None
    return Recommendation(decision, f"{_measured(evaluation, point)} {_UNKNOWN}", tolerance)


def _saves_at_no_loss(point: OperatingPoint) -> bool:
    """Whether it costs less than the best single target, and is neither certainly nor perhaps much worse."""
    change = point.accuracy_less_best_single
    return point.saved_usd.low > 0.0 and change.high >= 0.0 and change.low >= -_LOSS


def best_single(evaluation: Evaluation) -> str:
    """The name of the most accurate target; of equally accurate ones, the cheapest."""
    of_targets = evaluation.target_accuracy, evaluation.target_cost, evaluation.targets
    return max(zip(*of_targets, strict=True), key=lambda single: (single[0], -single[1]))[2]


def _saves(evaluation: Evaluation, point: OperatingPoint) -> str:
    return (
        f"Set tolerance {exactly(point.tolerance)}: it saves {in_words(point.saved_usd, '$')} per 1,000 requests, "
        f"{shown(point.saving_against_best_single.value, '%')} of what always using {best_single(evaluation)}, the "
        f"best single target, costs, and changes the {evaluation.quality} by "
        f"{in_words(point.accuracy_less_best_single, '+%')}."
    )


def _improves(evaluation: Evaluation, point: OperatingPoint) -> str:
    gain, more = in_words(point.accuracy_less_best_single, "+%"), in_words(point.saved_usd.negated, "$")
    return (
        f"Tolerance {exactly(point.tolerance)} raises the {evaluation.quality} by {gain} over always using "
        f"{best_single(evaluation)}, the best single target, for {more} more per 1,000 requests: set it if one more "
        f"{_unit(evaluation)} is worth {_worth(point)} to you."
    )


def _trades(evaluation: Evaluation, point: OperatingPoint) -> str:
    return (
        f"Tolerance {exactly(point.tolerance)} saves {in_words(point.saved_usd, '$')} per 1,000 requests, but changes "
        f"the {evaluation.quality} by {in_words(point.accuracy_less_best_single, '+%')} compared with always using "
        f"{best_single(evaluation)}, the best single target: set it if one {_unit(evaluation)} is worth less than "
        f"{_worth(point)} to you."
    )


def _unit(evaluation: Evaluation) -> str:
    return "reward of 1" if evaluation.is_judged else "right answer"


def _worth(point: OperatingPoint) -> str:
    """The cost of one right answer at which the router and the best single target are worth the same."""
    return usd(-point.saved_usd.value / point.accuracy_less_best_single.value)


def _does_not_pay(evaluation: Evaluation, point: OperatingPoint) -> str:
    changes = f"changes the {evaluation.quality} by {in_words(point.accuracy_less_best_single, '+%')}"
    effect = f"saves {in_words(point.saved_usd, '$')} per 1,000 requests, but that may be chance, and {changes}"
    if point.saved_usd.low > 0.0:
        effect = (
            f"saves {in_words(point.saved_usd, '$')} per 1,000 requests, but may lose over {_LOSS:.0%} of "
            f"{evaluation.quality}: it {changes}"
        )
    if point.saved_usd.value < 0.0:
        effect = f"costs {in_words(point.saved_usd.negated, '$')} more per 1,000 requests and {changes}"
    return (
        f"Use {best_single(evaluation)}, the best single target, alone: no tolerance is shown to pay. Tolerance "
        f"{exactly(point.tolerance)} {effect}."
    )


def _measured(evaluation: Evaluation, point: OperatingPoint) -> str:
    if point is not evaluation.operating_points[0]:
        return "It was chosen on these held-out prompts: expect a little less, and measure it on others."
    by, chosen = evaluation.num_validation, ""
    if by is not None:
        chosen = f"chosen on {by:,} validation prompts and "
    return f"It was {chosen}measured on {evaluation.num_complete:,} held-out ones."


def _too_few(evaluation: Evaluation, own: OperatingPoint) -> Recommendation | None:
    """What is too little, and what would be enough; None if the data show a gain or a loss, or can rule out `_LOSS`."""
    change, num_held_out = own.accuracy_less_best_single, evaluation.num_complete
    num_validation = evaluation.num_validation
    half_width = 0.5 * (change.high - change.low) if isfinite(change.low) else 1.0
    have = num_held_out if num_validation is None else min(num_held_out, num_validation)
    enough = ENOUGH_VALIDATION
    is_open = not (change.low >= -_LOSS or change.high <= 0.0) and half_width > _LOSS
    if is_open:  # it shrinks with the square root of the number of prompts
        enough = max(enough, _rounded_up(num_held_out * (half_width / _LOSS) ** 2))
    elif have >= enough:
        return None
    best, cost = max(evaluation.target_accuracy), evaluation.router.best_single_cost
    chosen = (
        ""
        if num_validation is None
        else f"{num_validation:,} validation prompts chose tolerance {exactly(own.tolerance)}, and "
    )
    return Recommendation(
        f"The data is too little to choose a tolerance. Until there is more, use {best_single(evaluation)}, the best "
        f"single target, alone: {evaluation.quality} {shown(best, '%')} at {shown(cost, '$')} per 1,000 requests.",
        f"{chosen}{num_held_out:,} held-out prompts {'leave open' if is_open else 'tell'} how the router changes the "
        f"{evaluation.quality}: by {shown(change.low, '+%')} to {shown(change.high, '+%')}. About {enough:,} held-out "
        f"prompts and as many for validation would be enough to notice a loss of {_LOSS:.0%}: "
        f"{ceil(enough / max(have, 1)):,} times as many graded prompts as now.",
    )


def _rounded_up(number: float) -> int:
    """With two significant digits."""
    unit = int(10 ** max(len(str(ceil(number))) - 2, 0))
    return unit * ceil(number / unit)
