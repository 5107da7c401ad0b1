"""Calls to targets under crashes at any moment: recorded answers are not asked again, and possible costs count."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

from crashes.enumeration import Machines, Scenario, crash_everywhere
from crashes.life import mortal
from prefill_router.collection.answers import ShardPlace, load_states, write_states
from prefill_router.collection.journal import Journal
from prefill_router.collection.shared_budget import Allowance, SharedBudget
from prefill_router.collection.target_calls import Asked, Spent, TargetAnswer, TargetCall
from prefill_router.policy.pool import Target, Upstream

TARGET = Target(name="small", input_price=1.0, output_price=4.0, upstream=Upstream(base_url="http://localhost"))
CALLS = [TargetCall(f"p{i}", f"prompt {i}", TARGET, Asked(max_output_tokens=100)) for i in range(3)]
KEYS = [call.key for call in CALLS]
REFUSED = CALLS[1]  # its first attempt is refused and costs nothing
ANSWER = TargetAnswer("the Rhine", "stop", 20, 10, 0, 0.25)


class Asking(Scenario):
    """Makes three calls concurrently within a budget, records the answers, and repeats calls without an answer."""

    budget = Spent(1.0, 10_000)

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.place = ShardPlace(out, "shard")
        self.asked = Counter[str]()  # number of times the target was asked, by call
        self.answered: set[str] = set()  # calls whose answers are recorded

    def run(self) -> None:
        asyncio.run(mortal(self._collect()))

    async def _collect(self) -> None:
        states = load_states(self.place)
        write_states(self.place, states)  # includes what a killed run has recorded
        purse = SharedBudget(self.budget - _spent(states.values()))
        allowance = Allowance(_at_once(purse.draw), _at_once(purse.give_back))
        journal = Journal(self.place.journal)
        wanted = [call for call in CALLS if call.key not in states or states[call.key].answer is None]
        await asyncio.gather(*(self._ask(call, journal, allowance) for call in wanted))
        write_states(self.place, load_states(self.place))

    async def _ask(self, call: TargetCall, journal: Journal, allowance: Allowance) -> None:
        while await allowance.reserve(call.worst):
            assert call.key not in self.answered, "an answer that was noted is paid for again"
            name = await journal.begin(call)
            self.asked[call.key] += 1
            if call == REFUSED and self.asked[call.key] == 1:
                await journal.end(name, None, Spent(), Spent(), "status 500")
                await allowance.settle(call.worst, Spent())
                continue
            await journal.end(name, ANSWER, ANSWER.spent(call), Spent(), None)
            self.answered.add(call.key)
            await allowance.settle(call.worst, ANSWER.spent(call))
            return

    @property
    def paid(self) -> Spent:
        """The bill of the target: each request but the first refusal."""
        return sum((ANSWER.spent(CALLS[0]) for _ in range(self.asked.total() - (REFUSED.key in self.asked))), Spent())

    def check(self) -> None:
        """Recorded answers are not lost, and the recorded spending covers the bill."""
        states = load_states(self.place)
        assert {key for key, state in states.items() if state.answer is not None} >= self.answered
        assert self.paid.fits(_spent(states.values()))
        assert _spent(states.values()).fits(self.budget)

    def result(self) -> Any:
        """The states of the calls, without the cost of crashes, which is at most one attempt per call and crash."""
        self.check()
        states = load_states(self.place)
        assert all(state.lost.fits(CALLS[0].worst + CALLS[0].worst) for state in states.values())
        return {key: replace(state, lost=Spent(), attempts=0, reason=None) for key, state in states.items()}


def _at_once(function: Any) -> Any:
    async def called(*arguments: Any) -> Any:
        return function(*arguments)

    return called


def _spent(states: Any) -> Spent:
    return sum((state.spent + state.lost for state in states), Spent())


def test_no_answer_is_paid_for_twice_and_no_attempt_is_forgotten(machines: Machines) -> None:
    assert crash_everywhere(machines, Asking, second_crashes=1) > 15
