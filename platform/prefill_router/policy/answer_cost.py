"""What answers cost: as they were billed, else by the pool's prices and their lengths.

Source: platform/METHOD.md, "Costs of answers".
"""

# N prompts, T targets of the pool

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.common.schema import COST_USD, TARGET
from prefill_router.outcomes import tables
from prefill_router.policy.pool import Pool

Array = NDArray[Any]


def answer_costs(
    pool: Pool, input_tokens: Array, output_tokens: Array, cost_usd: Array | None, expected_output_tokens: Array
) -> NDArray[np.float64]:
    """Returns what answers cost (N, T), or would have cost, in USD.

    A cost in `cost_usd` (N, T) was billed and is taken as it is. Where it is NaN, or `cost_usd` is None, the cost
    follows from the pool's prices, `input_tokens` (N,) and `output_tokens` (N, T), or where these are NaN,
    `expected_output_tokens`, (N, T) or (T,).
    """
    lengths = np.where(np.isnan(output_tokens), expected_output_tokens, output_tokens)
    computed = pool.expected_cost(input_tokens, lengths)
    return computed if cost_usd is None else np.where(np.isnan(cost_usd), computed, cost_usd)


def implied_lengths(pool: Pool, input_tokens: Array, output_tokens: Array, cost_usd: Array) -> NDArray[np.float32]:
    """Fills unknown `output_tokens` (N, T), which are NaN, with those that make up a billed cost at the pool's prices.

    An implied length is (cost - cost of the input) / output price, at least 0. It stays NaN if there is no billed cost,
    or output tokens are free.
    """
    output_price = pool.token_prices(input_tokens)[1] / 1e6
    made = cost_usd - pool.expected_cost(input_tokens, np.zeros(output_tokens.shape))
    lengths = np.maximum(made, 0.0) / np.where(output_price > 0.0, output_price, np.nan)
    return np.where(np.isnan(output_tokens), lengths, output_tokens).astype(np.float32)


def with_answer_prices(pool: Pool, cost_usd: Array) -> Pool:
    """Returns the pool with a price per answer for each target without any: its mean billed cost, if one is known.

    `cost_usd` is (N, T), NaN where unknown; further columns are ignored.
    """
    targets = []
    for target, costs in zip(pool.targets, cost_usd.T, strict=False):
        known = costs[~np.isnan(costs)].astype(np.float64)
        if len(known) and not any(pool.prices[target.name]):
            target = target.model_copy(update={"usd_per_answer": float(known.mean())})
        targets.append(target)
    return pool.model_copy(update={"targets": tuple(targets)})


def check_prices(pool: Pool, outcomes: str) -> None:
    """Raises UserError if a target has no price, and not every outcome of it at `outcomes` has a billed cost."""
    unpriced = [target.name for target in pool.targets if not target.is_priced]
    if not unpriced:
        return
    unknown: Counter[str] = Counter()
    for table in tables(outcomes):
        unknown.update(table.filter(pc.is_null(table[COST_USD]))[TARGET].to_pylist())
    for name in unpriced:
        if unknown[name]:
            raise UserError(
                f'pool "{pool.name}": target "{name}": input_price is missing, and {unknown[name]:,} of its outcomes '
                f"in {outcomes} have no cost_usd: give input_price and output_price in a pool file, passed as --pool, "
                "or the cost of every answer"
            )


def billed_share(correct: Array, cost_usd: Array | None) -> float:
    """Returns the share of the graded answers, those not NaN in `correct` (N, T), whose cost was billed."""
    graded = ~np.isnan(correct)
    return 0.0 if cost_usd is None else float((~np.isnan(cost_usd))[graded].mean())
