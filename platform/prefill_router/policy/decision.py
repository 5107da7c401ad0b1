"""From what a router predicts of prompts to where each of them goes, under its caller's own policy."""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.common.money import usd
from prefill_router.encoder.tokenization import Tokens
from prefill_router.policy.pool import Pool
from prefill_router.policy.selection import NO_TARGET, choose


class Prediction(NamedTuple):
    """P(correct) (N, T) and the expected (mean) length of each target's answer (N, T), in tokens; or (T,) of one."""

    p_correct: NDArray[np.float32]
    expected_output_tokens: NDArray[np.float32]


@dataclass(frozen=True)
class Policy:
    """What a caller wants of a decision, beside the cheapest target that is good enough."""

    tolerance: float | None = None  # give up at most this much P(correct); None is the router's own
    allowed: Sequence[str] | None = None  # names of targets; None is all
    max_cost: float | None = None  # USD a prompt
    min_p: float | None = None

    def mask(self, pool: Pool) -> NDArray[np.bool_]:
        """The targets that are allowed (T,). Raises UserError for one that is not in the pool."""
        names = pool.target_names
        for name in self.allowed or ():
            if name not in names:
                raise UserError(f'target "{name}" is not in the pool: {", ".join(names)}')
        return np.array([self.allowed is None or name in self.allowed for name in names])


@dataclass(frozen=True)
class Decision:
    """Where a prompt goes, and why. `target` is None where no target met the constraints."""

    target: str | None
    p_correct: dict[str, float]
    expected_output_tokens: dict[str, float]
    expected_cost_usd: dict[str, float]
    input_tokens: int  # as the encoder's tokenizer counts them, with its chat template
    is_truncated: bool  # the encoder read the prompt without its middle
    router_version: str
    propensity: float = 1.0  # with which the target was chosen: below 1 where others are explored
    is_explored: bool = False  # chosen by chance


def decide(
    pool: Pool,
    prediction: Prediction,
    tokens: Tokens,
    policies: Sequence[Policy],
    default_tolerance: float,
    version: str,
) -> list[Decision]:
    """The decision for each tokenised prompt, under its own policy.

    Costs count all tokens of a prompt, those too that the encoder cut. Raises UserError for a policy that names a
    target which is not in the pool.
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
) -> Decision:
    """The decision for one prompt, whose prediction has the shape (T,). Raises UserError as `decide` does."""
    names = pool.target_names
    costs_T = pool.expected_cost(np.array([input_tokens]), prediction.expected_output_tokens[None])[0]
    tolerance = default_tolerance if policy.tolerance is None else policy.tolerance
    limits = policy.mask(pool), policy.max_cost, policy.min_p
    chosen = int(choose(prediction.p_correct[None], costs_T, tolerance, *limits)[0])

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
    )


def explore(decision: Decision, policy: Policy, share: float, rng: Random) -> Decision:
    """The decision, or in a `share` of all cases one of the targets that the policy allows, each as likely.

    The propensity says how likely the target of this decision was, so that outcomes can be weighed by it.
    """
    names = [target for target in decision.p_correct if _limit(decision, policy, target) is None]
    if decision.target is None or not share or not names:
        return decision
    is_explored = rng.random() < share
    target = rng.choice(names) if is_explored else decision.target
    propensity = share / len(names) + (1.0 - share) * (target == decision.target)
    return replace(decision, target=target, propensity=propensity, is_explored=is_explored)


def explain(decision: Decision, policy: Policy, tolerance: float) -> dict[str, str]:
    """Of each target, why it was chosen or not, under the policy and the tolerance that the decision was made with."""
    allowed = [t for t in decision.p_correct if _limit(decision, policy, t) is None]
    best = max((decision.p_correct[t] for t in allowed), default=0.0)

    def reason(target: str) -> str:
        gives_up = best - decision.p_correct[target]
        if target == decision.target and decision.is_explored:
            return "explored: chosen by chance"
        if target == decision.target:
            return f"chosen: the cheapest within {tolerance:.3g} of the best P(correct), {best:.3f}"
        if (limit := _limit(decision, policy, target)) is not None:
            return limit
        if gives_up > tolerance:
            return f"gives up {gives_up:.3f} of P(correct), more than the tolerance, {tolerance:.3g}"
        return "good enough, but not the cheapest"

    return {target: reason(target) for target in decision.p_correct}


def _limit(decision: Decision, policy: Policy, target: str) -> str | None:
    """What of the policy rules a target out."""
    p, cost_usd = decision.p_correct[target], decision.expected_cost_usd[target]
    if policy.allowed is not None and target not in policy.allowed:
        return "not among the targets that are allowed"
    if policy.max_cost is not None and cost_usd > policy.max_cost:
        return f"expected to cost {usd(cost_usd)}, more than {usd(policy.max_cost)}"
    if policy.min_p is not None and p < policy.min_p:
        return f"P(correct) {p:.3f} is less than {policy.min_p:.3g}"
    return None
