"""Off-policy evaluation: estimates a policy's expected reward from requests that another policy routed.

A logged request reveals the outcome of its own target only, so it is weighted by the inverse of the probability of that
choice. Estimators: inverse propensity (Horvitz and Thompson, 1952), its self-normalised form (Swaminathan and Joachims,
2015), and doubly robust, which corrects a model's prediction (Dudik, Langford and Li, 2011).
"""

# N requests, T targets, B bootstrap draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.common.schema import CORRECT, LATENCY_S, PROMPT_ID, PROPENSITY, TARGET
from prefill_router.corpus.split import prompt_hashes
from prefill_router.metrics import Interval, bootstrap_weights, interval_from_draws
from prefill_router.metrics.discrimination import ratio
from prefill_router.outcomes import at_threshold, load_feedback

Array = NDArray[Any]


@dataclass(frozen=True)
class Log:
    """Logged requests with their target, reward and propensity, the probability of that choice."""

    chosen: Array  # (N,) index of the target; -1 for a target outside the pool
    reward: Array  # (N,) in [0, 1]
    propensity: Array  # (N,) in (0, 1]
    clusters: Array | None = None  # (N,) requests with the same prompt share a cluster
    latency_s: Array | None = None  # (N,) seconds of whole answers, NaN if unknown

    def __post_init__(self) -> None:
        if not len(self.chosen):
            raise UserError("the log has no request with an outcome: wait for feedback")
        if not ((self.propensity > 0) & (self.propensity <= 1)).all():
            raise UserError("propensity must be above 0 and at most 1: remove the invalid rows from the log")

    def __getitem__(self, rows: Array) -> Log:
        clusters, latency_s = (None if of is None else of[rows] for of in (self.clusters, self.latency_s))
        return Log(self.chosen[rows], self.reward[rows], self.propensity[rows], clusters, latency_s)


def load_log(uri: str, targets: Sequence[str], correct_at: float | None = None) -> tuple[NDArray[np.uint64], Log]:
    """Reads the feedback at `uri`: the hashes of the prompts (N,), and the log, with rewards as `load_outcomes` reads.

    Raises UserError if no request has an outcome, or a file has no propensities.
    """
    table = load_feedback(uri)
    keys = prompt_hashes(table[PROMPT_ID].to_pylist())
    index = pc.index_in(table[TARGET], value_set=pa.array(list(targets), pa.string()))
    chosen = np.asarray(pc.fill_null(index, -1), np.int64)
    reward, propensity = (table[name].to_numpy().astype(np.float64) for name in (CORRECT, PROPENSITY))
    if correct_at is not None:
        reward = at_threshold(reward, correct_at).astype(np.float64)
    latency_s = table[LATENCY_S].to_numpy().astype(np.float64)
    return keys, Log(chosen, reward, propensity, keys, latency_s)


def every_reward(log: Log, model: Array) -> Array:
    """Doubly robust estimates of the reward of every target on every request (N, T), given the `model`'s (N, T).

    They are the model's predictions, and for the target that was chosen its prediction plus the error of that, divided
    by the propensity. Their mean over the choices is the expected reward, whatever the model, if each target could have
    been chosen.
    """
    rewards, rows = np.array(model, np.float64), np.flatnonzero(log.chosen >= 0)
    chosen = log.chosen[rows]
    rewards[rows, chosen] += (log.reward[rows] - rewards[rows, chosen]) / log.propensity[rows]
    return rewards


@dataclass(frozen=True)
class PolicyValue:
    """Estimates of a policy's expected reward, and how much of the log supports them."""

    policy: str
    ips: Interval
    snips: Interval
    doubly_robust: Interval
    model: float  # the model's prediction alone
    support: float  # share of requests on which the logging policy could have chosen as this policy does
    effective_requests: float  # effective sample size of the weighted requests (Kish, 1965)


def policy_value(policy: str, log: Log, choice: Array, model: Array, num_draws: int = 500) -> PolicyValue:
    """Estimates the value of a policy that chooses `choice` (N,); `model` (N, T) predicts every target's reward."""
    rows = np.arange(len(choice))
    is_same = choice == log.chosen
    weight = is_same / log.propensity
    expected = np.asarray(model, np.float64)
    robust = every_reward(log, expected)[rows, choice]
    draws = bootstrap_weights(len(choice), num_draws, clusters=log.clusters, all_first=True).astype(np.float64)
    num_drawn = draws.sum(1)
    weighted_reward = draws @ (weight * log.reward)

    return PolicyValue(
        policy=policy,
        ips=interval_from_draws(weighted_reward / num_drawn),
        snips=interval_from_draws(ratio(weighted_reward, draws @ weight)),
        doubly_robust=interval_from_draws(draws @ robust / num_drawn),
        model=float(expected[rows, choice].mean()),
        # A propensity of 1 means that no other target could have been chosen.
        support=float((is_same | (log.propensity < 1.0)).mean()),
        effective_requests=float(ratio(np.square(weight.sum()), np.square(weight).sum())),
    )
