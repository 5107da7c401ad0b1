"""Allocates a budget over a whole log: each prompt goes to the target with the highest P(correct) - price * cost.

By Lagrange duality, the choice with the most correct answers for a total cost is optimal at some shadow price per USD,
so only that price is searched for. The search uses sums over the log only, so a log may have any size and be stored
anywhere. Source: Everett, "Generalized Lagrange multiplier method" (1963).
"""

# N prompts, T targets, K shadow prices

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefill_router.common.errors import UserError
from prefill_router.common.money import usd
from prefill_router.policy.selection import NO_TARGET

_NUM_PRICES = 33  # tried in one pass over the log
_NUM_PASSES = 4
_DECADES = (-4.0, 8.0)  # range of prices tried, as powers of ten of P(correct) per mean cost


class Totals(NamedTuple):
    """Totals of a log at each of K shadow prices."""

    cost_usd: NDArray[np.float64]  # (K,)
    correct: NDArray[np.float64]  # (K,) expected number of correct answers


class Allocation(NamedTuple):
    """The shadow prices, in P(correct) per USD, that spend a budget: two prices that are nearly equal.

    A share of the lines uses the lower price, the others the higher one, so that the budget is used up even if many
    lines switch targets at the same price.
    """

    low_price: float
    high_price: float
    share: float  # of lines that use the low price
    budget_usd: float
    cost_usd: float  # expected, of the whole log
    correct: float  # expected, of the whole log
    bound: float  # upper bound on expected correct answers within the budget

    @property
    def gap(self) -> float:
        """An upper bound on what a better choice could gain, as a share of the correct answers."""
        return (self.bound - self.correct) / max(self.bound, 1e-12)


def allocate(p: ArrayLike, cost: ArrayLike, price: ArrayLike, eligible: ArrayLike) -> NDArray[np.int64]:
    """Returns each prompt's target (N,) at a shadow price, scalar or (N,); NO_TARGET if none is eligible.

    `p` and `cost` are (N, T), `eligible` is (N, T) or (T,). A tie goes to the cheaper, then to the earlier target.
    """
    p_NT, cost_NT = np.asarray(p, np.float64), np.asarray(cost, np.float64)
    eligible_NT = np.broadcast_to(eligible, p_NT.shape)
    value = np.where(eligible_NT, p_NT - np.asarray(price, np.float64).reshape(-1, 1) * cost_NT, -np.inf)
    is_best = value >= value.max(axis=1, keepdims=True)
    chosen = np.where(is_best & eligible_NT, cost_NT, np.inf).argmin(axis=1)
    return np.where(eligible_NT.any(axis=1), chosen, NO_TARGET)


def totals(p: ArrayLike, cost: ArrayLike, weights: ArrayLike, eligible: ArrayLike, prices: ArrayLike) -> Totals:
    """Totals N prompts, each repeated `weights` (N,) times in the log, at each of the prices (K,)."""
    p_NT, cost_NT, weights_N = (np.asarray(values, np.float64) for values in (p, cost, weights))
    spent, correct = [], []
    for price in np.atleast_1d(prices):
        chosen = allocate(p_NT, cost_NT, price, eligible)
        rows = np.flatnonzero(chosen != NO_TARGET)
        spent.append(float(weights_N[rows] @ cost_NT[rows, chosen[rows]]))
        correct.append(float(weights_N[rows] @ p_NT[rows, chosen[rows]]))
    return Totals(np.array(spent), np.array(correct))


def solve(budget_usd: float, mean_cost_usd: float, evaluate: Callable[[NDArray[np.float64]], Totals]) -> Allocation:
    """Finds the allocation of a budget; `evaluate` returns the log's totals at given prices.

    `mean_cost_usd` over targets and prompts sets the scale of the search. Raises UserError if the budget is below the
    cost of the cheapest choice.
    """
    scale = 1.0 / max(mean_cost_usd, 1e-12)
    prices = np.concatenate([[0.0], scale * np.logspace(*_DECADES, _NUM_PRICES)])
    for _ in range(_NUM_PASSES):
        found = evaluate(prices)
        affordable = np.flatnonzero(found.cost_usd <= budget_usd)
        if not len(affordable):
            raise UserError(
                f"budget_usd = {budget_usd:g}, but the log costs at least {usd(float(found.cost_usd[-1]))}: raise the "
                "budget or allow cheaper targets"
            )
        high = int(affordable[0])
        low = max(high - 1, 0)
        result = _mixed(budget_usd, prices[[low, high]], Totals(*(values[[low, high]] for values in found)))
        if high == 0:
            break
        first = max(prices[low], prices[high] * 1e-3)  # a geometric series cannot start at 0
        prices = np.unique(np.concatenate([prices[[low]], np.geomspace(first, prices[high], _NUM_PRICES)]))
    return result


def _mixed(budget_usd: float, prices: NDArray[np.float64], found: Totals) -> Allocation:
    """Mixes two neighbouring prices, of which the higher is affordable, to spend the budget."""
    (low_cost, high_cost), (low_correct, high_correct) = found
    share = min(1.0, max(0.0, (budget_usd - high_cost) / (low_cost - high_cost))) if low_cost > high_cost else 1.0
    duals = found.correct + prices * (budget_usd - found.cost_usd)
    return Allocation(
        low_price=float(prices[0]),
        high_price=float(prices[1]),
        share=share,
        budget_usd=budget_usd,
        cost_usd=float(share * low_cost + (1.0 - share) * high_cost),
        correct=float(share * low_correct + (1.0 - share) * high_correct),
        bound=float(duals.min()),
    )
