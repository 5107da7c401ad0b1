"""A budget under any order of calls: spending never exceeds it, and all of it can be spent."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.collection.shared_budget import Allowance, SharedBudget
from prefill_router.collection.target_calls import Spent


async def spend(budget: Spent, calls: list[Spent], num_workers: int, seed: int) -> tuple[Spent, int, SharedBudget]:
    """Makes calls that cost at most their reservation; returns their cost, how many were made, and the budget."""
    rng, purse = random.Random(seed), SharedBudget(budget)

    async def draw(wanted: Spent) -> Spent:
        await asyncio.sleep(0)
        return purse.draw(wanted)

    async def give_back(part: Spent) -> None:
        purse.give_back(part)

    workers = [Allowance(draw, give_back) for _ in range(num_workers)]
    spent, made = Spent(), 0

    async def call(worst: Spent, worker: Allowance) -> None:
        nonlocal spent, made
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if not await worker.reserve(worst):
            return
        await asyncio.sleep(0)
        cost = Spent(worst.usd * rng.random(), rng.randint(0, worst.tokens))
        spent, made = spent + cost, made + 1
        assert spent.usd <= budget.usd + 1e-9
        assert spent.tokens <= budget.tokens
        await worker.settle(worst, cost)

    await asyncio.gather(*(call(worst, rng.choice(workers)) for worst in calls))
    for worker in workers:
        await worker.give_back()
    return spent, made, purse


CALLS = st.lists(st.builds(Spent, st.floats(0.0, 1.0), st.integers(0, 1000)), max_size=30)


@settings(deadline=None, max_examples=100)
@given(CALLS, st.floats(0.0, 10.0), st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 99))
def test_what_is_spent_never_exceeds_the_budget(
    calls: list[Spent], usd: float, tokens: int, num_workers: int, seed: int
) -> None:
    spent, _, purse = asyncio.run(spend(Spent(usd, tokens), calls, num_workers, seed))
    assert abs(purse.left.usd - (usd - spent.usd)) < 1e-6
    assert purse.left.tokens == tokens - spent.tokens


def test_a_call_waits_for_what_others_do_not_need() -> None:
    """Ten calls each reserve most of the budget and cost a fraction of it: all can be made, one after another."""
    rng_calls = [Spent(1.0, 100)] * 10

    async def scenario() -> int:
        purse, made = SharedBudget(Spent(1.5, 150)), 0

        async def draw(wanted: Spent) -> Spent:
            return purse.draw(wanted)

        async def give_back(part: Spent) -> None:
            purse.give_back(part)

        worker = Allowance(draw, give_back)

        async def call(worst: Spent) -> None:
            nonlocal made
            assert await worker.reserve(worst)
            await asyncio.sleep(0)
            made += 1
            await worker.settle(worst, Spent(0.05, 5))

        await asyncio.wait_for(asyncio.gather(*(call(worst) for worst in rng_calls)), 10)
        return made

    assert asyncio.run(scenario()) == 10


def test_a_call_that_the_budget_cannot_hold_is_left_out() -> None:
    spent, made, _ = asyncio.run(spend(Spent(0.5, 10_000), [Spent(0.6, 1)] * 3, 2, 0))
    assert (spent, made) == (Spent(), 0)
