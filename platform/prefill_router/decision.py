"""From what a router predicts of prompts to where each of them goes, under its caller's own policy."""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.encoder import Tokens
from prefill_router.errors import UserError
from prefill_router.policy import NO_TARGET, choose
from prefill_router.pool import Pool


class Prediction(NamedTuple):
    """P(correct) (N, T) and the expected (median) length of each target's answer (N, T), in tokens."""

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
    cost_usd = pool.expected_cost(tokens.full_lengths, prediction.expected_output_tokens)
    names = pool.target_names

    def by_target(values: NDArray[Any]) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    decisions = []
    for i, (policy, is_truncated) in enumerate(zip(policies, tokens.is_truncated.tolist(), strict=True)):
        tolerance = default_tolerance if policy.tolerance is None else policy.tolerance
        limits = policy.mask(pool), policy.max_cost, policy.min_p
        chosen = int(choose(prediction.p_correct[i][None], cost_usd[i], tolerance, *limits)[0])
        decisions.append(
            Decision(
                target=None if chosen == NO_TARGET else names[chosen],
                p_correct=by_target(prediction.p_correct[i]),
                expected_output_tokens=by_target(prediction.expected_output_tokens[i]),
                expected_cost_usd=by_target(cost_usd[i]),
                input_tokens=int(tokens.full_lengths[i]),
                is_truncated=is_truncated,
                router_version=version,
            )
        )
    return decisions
