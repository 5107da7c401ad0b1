"""Decisions: the target of each prompt, from the router's prediction and the caller's policy."""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.common.money import usd
from prefill_router.encoder.tokenization import Tokens
from prefill_router.policy.answer_times import AnswerTimes, ExpectedTimes
from prefill_router.policy.pool import Pool
from prefill_router.policy.selection import NO_TARGET, choose

ReasonCode = Literal[
    "chosen",
    "explored",
    "safe_target",
    "not_allowed",
    "max_cost_usd",
    "min_p_correct",
    "max_latency_s",
    "tolerance",
    "not_cheapest",
]


class Prediction(NamedTuple):
    """P(correct) and expected (mean) output tokens of every target, each (N, T), or (T,) for a single prompt."""

    p_correct: NDArray[np.float32]
    expected_output_tokens: NDArray[np.float32]


@dataclass(frozen=True)
class Policy:
    """A caller's constraints on a decision."""

    tolerance: float | None = None  # P(correct) that may be given up for a lower cost; None is the router's default
    allowed: Sequence[str] | None = None  # names of targets; None is all
    max_cost: float | None = None  # USD per prompt
    min_p: float | None = None
    max_latency: float | None = None  # expected seconds of the whole answer; targets of unknown times are permitted

    def mask(self, pool: Pool) -> NDArray[np.bool_]:
        """Returns the allowed targets as a mask (T,). Raises UserError for a target that is not in the pool."""
        names = pool.target_names
        for name in self.allowed or ():
            if name not in names:
                raise UserError(f'target "{name}" is not in the pool: {", ".join(names)}')
        return np.array([self.allowed is None or name in self.allowed for name in names])


class KnownPrefix(NamedTuple):
    """What the last call of a conversation tells about the cost of the next one."""

    target: str  # that answered it
    cached_tokens: int = 0  # of the prompt, which this target has read and bills at its cached rate
    uncounted_tokens: int = 0  # of the prompt, which targets bill but the encoder does not count, such as tools


@dataclass(frozen=True)
class Decision:
    """The chosen target of a prompt and the figures behind the choice. `target` is None if none meets the policy."""

    target: str | None
    p_correct: dict[str, float]
    expected_output_tokens: dict[str, float]
    expected_cost_usd: dict[str, float]
    input_tokens: int  # counted by the encoder's tokenizer, with its chat template
    is_truncated: bool  # the encoder read the prompt without its middle
    router_version: str
    propensity: float = 1.0  # probability of choosing this target; below 1 if exploration is on
    is_explored: bool = False  # chosen at random
    cached_usd: dict[str, float] = field(default_factory=dict)  # what a cached prefix saves, by target
    is_safe: bool = False  # chosen since the prompt is unlike those of training
    expected_times: dict[str, ExpectedTimes] = field(default_factory=dict)  # of the targets whose times are known

    def next_usd(self, target: str) -> float:
        """The expected cost at a target, less what its cached prefix saves."""
        return self.expected_cost_usd[target] - self.cached_usd.get(target, 0.0)


class Reason(NamedTuple):
    """Why a target was or was not chosen: a code, a sentence, and the value that decided with what it was compared to.

    | code | value | limit |
    | --- | --- | --- |
    | chosen, tolerance | P(correct) below the best one | the tolerance |
    | not_cheapest | expected cost | that of the chosen target |
    | max_cost_usd, min_p_correct | expected cost, P(correct) | the policy's |
    | explored | probability of this target | |
    | max_latency_s | expected seconds of the answer | the policy's |
    | safe_target, not_allowed | | |
    """

    code: ReasonCode
    text: str
    value: float | None = None
    limit: float | None = None


def decide(
    pool: Pool,
    prediction: Prediction,
    tokens: Tokens,
    policies: Sequence[Policy],
    default_tolerance: float,
    version: str,
) -> list[Decision]:
    """Decides each tokenised prompt under its own policy.

    Costs include the tokens that the encoder truncated. Raises UserError for a policy that names a target outside the
    pool.
    """
    prompts = zip(prediction.p_correct, prediction.expected_output_tokens, strict=True)
    lengths = zip(tokens.full_lengths.tolist(), tokens.is_truncated.tolist(), strict=True)
    return [
        decide_one(pool, Prediction(*of_prompt), *length, policy, default_tolerance, version)
        for of_prompt, length, policy in zip(prompts, lengths, policies, strict=True)
    ]


def decide_one(
    pool: Pool,
    prediction: Prediction,
    input_tokens: int,
    is_truncated: bool,
    policy: Policy,
    default_tolerance: float,
    version: str,
    known: KnownPrefix | None = None,
    times: AnswerTimes | None = None,
) -> Decision:
    """Decides one prompt, whose prediction has shape (T,). Raises UserError as `decide` does.

    In a conversation, the target of the last call is chosen by its cost with the `known` prefix cached.
    """
    names = pool.target_names
    billed_tokens = input_tokens + (0 if known is None else known.uncounted_tokens)
    costs_T = pool.expected_cost(np.array([billed_tokens]), prediction.expected_output_tokens[None])[0]
    cached_usd = {} if known is None else _cached_usd(pool, billed_tokens, known)
    next_T = costs_T - [cached_usd.get(name, 0.0) for name in names]
    tolerance = default_tolerance if policy.tolerance is None else policy.tolerance
    expected = _expected_times(pool, prediction, input_tokens, times) if times is not None else {}
    whole_s = (expected[name].whole_s if name in expected else None for name in names)
    latency_T = np.array([np.nan if seconds is None else seconds for seconds in whole_s])
    limits = policy.mask(pool), policy.max_cost, policy.min_p, latency_T, policy.max_latency
    chosen = int(choose(prediction.p_correct[None], next_T, tolerance, *limits)[0])

    def by_target(values_T: NDArray[Any]) -> dict[str, float]:
        return dict(zip(names, values_T.tolist(), strict=True))

    return Decision(
        target=None if chosen == NO_TARGET else names[chosen],
        p_correct=by_target(prediction.p_correct),
        expected_output_tokens=by_target(prediction.expected_output_tokens),
        expected_cost_usd=by_target(costs_T),
        input_tokens=input_tokens,
        is_truncated=is_truncated,
        router_version=version,
        cached_usd=cached_usd,
        expected_times=expected,
    )


def _cached_usd(pool: Pool, billed_tokens: int, known: KnownPrefix) -> dict[str, float]:
    readers = [target for target in pool.targets if target.name == known.target]
    return {t.name: t.cost(billed_tokens, 0.0) - t.cost(billed_tokens, 0.0, known.cached_tokens) for t in readers}


def _expected_times(
    pool: Pool, prediction: Prediction, input_tokens: int, times: AnswerTimes
) -> dict[str, ExpectedTimes]:
    """The expected times of the targets for which any is known."""
    lengths = zip(pool.targets, prediction.expected_output_tokens.tolist(), strict=True)
    expected = {target.name: times.of(target.name).expected(target, input_tokens, length) for target, length in lengths}
    return {name: found for name, found in expected.items() if found != (None, None)}


def explore(decision: Decision, policy: Policy, share: float, rng: Random) -> Decision:
    """With probability `share`, replaces the target by one drawn uniformly from those that the policy permits.

    Sets the propensity, the probability of the resulting target, so that outcomes can be weighted by it.
    """
    names = [target for target in decision.p_correct if _violation(decision, policy, target) is None]
    if decision.target is None or not share or not names:
        return decision
    is_explored = rng.random() < share
    target = rng.choice(names) if is_explored else decision.target
    propensity = share / len(names) + (1.0 - share) * (target == decision.target)
    return replace(decision, target=target, propensity=propensity, is_explored=is_explored)


def explain(decision: Decision, policy: Policy, tolerance: float) -> dict[str, Reason]:
    """Explains for each target why it was or was not chosen, given the policy and tolerance of the decision."""
    permitted = [t for t in decision.p_correct if _violation(decision, policy, t) is None]
    best = max((decision.p_correct[t] for t in permitted), default=0.0)

    def reason(target: str) -> Reason:
        gap, cost_usd = best - decision.p_correct[target], decision.next_usd(target)
        if target == decision.target and decision.is_explored:
            return Reason("explored", "explored: chosen at random", decision.propensity)
        if target == decision.target and decision.is_safe:
            return Reason("safe_target", "chosen: the safe target, for prompts that are unlike those of training")
        if target == decision.target:
            text = f"chosen: the cheapest within {tolerance:.9g} of the best P(correct), {best:.3f}"
            return Reason("chosen", text, gap, tolerance)
        if (violation := _violation(decision, policy, target)) is not None:
            return violation
        if gap > tolerance:
            text = f"P(correct) is {gap:.3f} below the best, more than the tolerance, {tolerance:.9g}"
            return Reason("tolerance", text, gap, tolerance)
        chosen_usd = None if decision.target is None else decision.next_usd(decision.target)
        return Reason("not_cheapest", "good enough, but not the cheapest", cost_usd, chosen_usd)

    return {target: reason(target) for target in decision.p_correct}


def _violation(decision: Decision, policy: Policy, target: str) -> Reason | None:
    """Returns which constraint of the policy a target violates, or None."""
    p, cost_usd = decision.p_correct[target], decision.next_usd(target)
    if policy.allowed is not None and target not in policy.allowed:
        return Reason("not_allowed", "not one of the allowed targets")
    if policy.max_cost is not None and cost_usd > policy.max_cost:
        text = f"expected cost {usd(cost_usd)} is above the limit, {usd(policy.max_cost)}"
        return Reason("max_cost_usd", text, cost_usd, policy.max_cost)
    if policy.min_p is not None and p < policy.min_p:
        return Reason("min_p_correct", f"P(correct) {p:.3f} is below the minimum, {policy.min_p:.3g}", p, policy.min_p)
    _, whole_s = decision.expected_times.get(target, (None, None))
    if policy.max_latency is not None and whole_s is not None and whole_s > policy.max_latency:
        text = f"expected to take {whole_s:.3g} s, above the limit, {policy.max_latency:.3g} s"
        return Reason("max_latency_s", text, whole_s, policy.max_latency)
    return None
