"""Budget allocation, compared with exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.query_log.allocation import Allocation, Totals, allocate, solve, totals

Array = NDArray[np.float64]


def log(num_prompts: int, seed: int = 0, num_targets: int = 4) -> tuple[Array, Array]:
    """Returns P(correct), which tends to grow with a target's price, and costs."""
    rng = np.random.default_rng(seed)
    prices = np.array([0.1, 0.5, 2.0, 9.0])[:num_targets] * 1e-3
    cost = prices * rng.lognormal(0.0, 0.7, (num_prompts, 1)) * rng.lognormal(0.0, 0.3, (num_prompts, num_targets))
    ability = np.linspace(-0.5, 1.5, num_targets) + rng.normal(0.0, 1.0, (num_prompts, num_targets))
    return 1.0 / (1.0 + np.exp(-ability)), cost


def solved(p: Array, cost: Array, budget: float, weights: Array | None = None) -> Allocation:
    weights = np.ones(len(p)) if weights is None else weights
    everyone = np.ones(p.shape[1], bool)
    return solve(budget, float(cost.mean()), lambda prices: totals(p, cost, weights, everyone, prices))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_no_choice_within_the_budget_is_better_than_the_bound(seed: int, place: float) -> None:
    p, cost = log(6, seed, num_targets=3)
    least, most = cost.min(1).sum(), cost.max(1).sum()
    budget = least + place * (most - least)
    rows = np.arange(6)
    choices = [np.array(choice) for choice in itertools.product(range(3), repeat=6)]
    best = max(p[rows, choice].sum() for choice in choices if cost[rows, choice].sum() <= budget * (1 + 1e-12))
    found = solved(p, cost, budget)
    assert best <= found.bound * (1 + 1e-9)
    assert found.cost_usd <= budget * (1 + 1e-9)


@pytest.mark.parametrize("place", [0.02, 0.1, 0.3, 0.6, 0.95])
def test_a_large_log_is_allocated_as_well_as_can_be(place: float) -> None:
    p, cost = log(5000)
    everyone = np.ones(4, bool)
    least, most = cost.min(1).sum(), float(totals(p, cost, np.ones(5000), everyone, [0.0]).cost_usd[0])
    budget = least + place * (most - least)
    found = solved(p, cost, budget)
    assert found.cost_usd == pytest.approx(budget, rel=1e-6)
    assert 0.0 <= found.gap < 1e-4
    chosen = allocate(
        p, cost, np.where(np.arange(5000) < found.share * 5000, found.low_price, found.high_price), [True]
    )
    assert cost[np.arange(5000), chosen].sum() == pytest.approx(budget, rel=5e-3)


def test_a_prompt_that_is_half_of_the_log_is_shared_out() -> None:
    p, cost = log(2000)
    weights = np.ones(2000)
    weights[7] = 2000
    rows = np.arange(2000)
    best = p.argmax(1)
    cheap = cost.argmin(1)
    budget = float((weights * cost[rows, cheap]).sum() * 0.5 + (weights * cost[rows, best]).sum() * 0.5)
    found = solved(p, cost, budget, weights)
    assert found.cost_usd == pytest.approx(budget, rel=1e-6)


def test_a_budget_that_is_more_than_enough_buys_the_best() -> None:
    p, cost = log(100)
    found = solved(p, cost, 1e9)
    assert (found.high_price, found.gap) == (0.0, 0.0)
    assert found.correct == pytest.approx(p.max(1).sum())


def test_a_budget_that_not_even_the_cheapest_choice_meets_is_an_error() -> None:
    p, cost = log(100)
    with pytest.raises(UserError, match=r"budget_usd = 1e-09, but the log costs at least \$0\.0\d+: "):
        solved(p, cost, 1e-9)


def test_constraints_hold_at_every_price() -> None:
    p, cost = log(300)
    eligible = cost < np.median(cost)
    eligible[5] = False
    for price in (0.0, 50.0, 1e6):
        chosen = allocate(p, cost, price, eligible)
        assert chosen[5] == -1
        others = np.arange(300) != 5
        has_any = eligible.any(1) & others
        assert eligible[has_any, chosen[has_any]].all()
    found = totals(p, cost, np.ones(300), eligible, [1e9])
    np.testing.assert_allclose(
        found.cost_usd, np.where(eligible, cost, np.inf).min(1)[eligible.any(1)].sum(), rtol=1e-6
    )


def test_dearer_prices_never_cost_more() -> None:
    p, cost = log(1000)
    found: Totals = totals(p, cost, np.ones(1000), np.ones(4, bool), np.logspace(-2, 6, 40))
    assert (np.diff(found.cost_usd) <= 1e-12).all()
    assert (np.diff(found.correct) <= 1e-9).all()
