"""Quality, cost and time of a router under limits on the time of an answer, from a gateway's log.

The time of a target is the mean of its logged answers, whatever their length. A target that the log has no time of is
permitted under every limit, as in the gateway.
"""

# N requests, T targets

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefill_router.evaluation.off_policy import Array, Log, PolicyValue, policy_value
from prefill_router.policy.selection import choose


@dataclass(frozen=True)
class LatencyPoint:
    """The router under one limit."""

    max_latency_s: float | None  # None: without a limit
    value: PolicyValue
    cost_usd: float  # mean expected cost of the choices
    latency_s: float  # mean time of the chosen targets, NaN if that of one is unknown


def latency_frontier(log: Log, p_correct: Array, cost: Array, tolerance: float, num_draws: int) -> list[LatencyPoint]:
    """The router without a limit, then with each target's mean time as limit, from the slowest but one to the fastest.

    `p_correct` and `cost` are (N, T). Empty if the log has the times of fewer than two targets.
    """
    latency_T = target_latency_s(log, p_correct.shape[1])
    limits = np.unique(latency_T[np.isfinite(latency_T)])[-2::-1]

    def point(limit: float | None) -> LatencyPoint:
        choice = choose(p_correct, cost, tolerance, latency=latency_T, max_latency=limit)
        name = "no limit" if limit is None else f"at most {limit:.3g} s"
        value = policy_value(name, log, choice, p_correct, num_draws)
        return LatencyPoint(limit, value, float(cost[np.arange(len(choice)), choice].mean()), latency_T[choice].mean())

    return [point(limit) for limit in (None, *limits.tolist())] if len(limits) else []


def target_latency_s(log: Log, num_targets: int) -> Array:
    """Mean seconds of a whole answer by target (T,), NaN where the log has none."""
    if log.latency_s is None:
        return np.full(num_targets, np.nan)
    is_known = np.isfinite(log.latency_s) & (log.chosen >= 0)
    num = np.bincount(log.chosen[is_known], minlength=num_targets)
    total_s = np.bincount(log.chosen[is_known], log.latency_s[is_known], minlength=num_targets)
    return np.where(num > 0, total_s / np.maximum(num, 1), np.nan)
