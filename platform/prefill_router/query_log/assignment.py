"""Assigns each line of a log to a target, by a tolerance or by the allocation of a budget."""

# N lines, T targets of the pool

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefill_router.corpus.split import mixed
from prefill_router.policy.pool import Pool
from prefill_router.policy.selection import choose
from prefill_router.query_log.allocation import Allocation, allocate
from prefill_router.query_log.estimates import PromptEstimates

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LogPolicy:
    """The policy for a whole log. The pool may be a subset of the router's targets, which estimates refer to."""

    pool: Pool
    outputs: tuple[int, ...]  # (T,) index of each target among the router's
    tolerance: float
    allowed: NDArray[np.bool_]  # (T,)
    max_cost_usd: float | None = None
    min_p_correct: float | None = None
    allocation: Allocation | None = None  # of the budget, once solved

    def read(self, estimates: PromptEstimates) -> tuple[Array, Array, Array]:
        """Returns P(correct), expected output tokens and expected cost in USD, each (N, T), at the pool's prices."""
        p = estimates.p_correct[:, self.outputs].astype(np.float64)
        lengths = estimates.output_tokens[:, self.outputs].astype(np.float64)
        return p, lengths, self.pool.expected_cost(estimates.input_tokens, lengths)

    def eligible(self, p: Array, cost_usd: Array) -> NDArray[np.bool_]:
        """Returns the targets that meet the constraints, as a mask (N, T)."""
        mask = np.broadcast_to(self.allowed, p.shape)
        if self.max_cost_usd is not None:
            mask = mask & (cost_usd <= self.max_cost_usd)
        return mask if self.min_p_correct is None else mask & (p >= self.min_p_correct)

    def __call__(self, p: Array, cost_usd: Array, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns each line's target (N,), NO_TARGET if none is eligible; `positions` are line numbers in the log."""
        eligible = self.eligible(p, cost_usd)
        if self.allocation is None:
            return choose(p, cost_usd, self.tolerance, eligible)
        draws = mixed(positions.astype(np.uint64)) / 2.0**64
        low, high = self.allocation.low_price, self.allocation.high_price
        return allocate(p, cost_usd, np.where(draws < self.allocation.share, low, high), eligible)
