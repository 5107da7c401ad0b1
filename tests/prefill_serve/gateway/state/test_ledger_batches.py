"""Batches of requests to the shared ledger, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from prefill_serve.gateway.state.call_ledger import Bid, LedgerUnavailable, LocalLedger
from prefill_serve.gateway.state.ledger_batches import LedgerBatches, LedgerRequest, answers_of
from prefill_serve.gateway.state.reservations import Reserved
from prefill_serve.settings import LedgerSettings


class Wire:
    """A connection to a ledger that passes a batch on when it is told to."""

    def __init__(self) -> None:
        self.ledger = LocalLedger()
        self.sizes: list[int] = []
        self.may_send = asyncio.Semaphore(0)
        self.error: Exception | None = None

    async def send(self, requests: list[LedgerRequest]) -> list[Any]:
        self.sizes.append(len(requests))
        await self.may_send.acquire()
        if self.error is not None:
            raise self.error
        return await answers_of(self.ledger, requests)


def play(scenario: Callable[[Wire, LedgerBatches], Awaitable[None]]) -> None:
    async def run() -> None:
        wire = Wire()
        await scenario(wire, LedgerBatches(wire.send))
        await wire.ledger.close()

    asyncio.run(run())


async def asked(batches: LedgerBatches, method: str, *arguments: Any) -> asyncio.Task[Any]:
    """A request that waits for its answer."""
    task = asyncio.create_task(batches.ask(method, *arguments))
    for _ in range(3):  # until it is sent, if it can be
        await asyncio.sleep(0)
    return task


def bid(usd: float) -> list[Bid]:
    return [Bid("big", usd)]


def test_requests_that_come_while_a_batch_is_away_share_the_next() -> None:
    async def scenario(wire: Wire, batches: LedgerBatches) -> None:
        tasks = [await asked(batches, "reserve", f"t{i}", "ann", bid(0.5)) for i in range(5)]
        assert wire.sizes == [1]  # the first left at once
        wire.may_send.release()
        wire.may_send.release()
        assert await asyncio.gather(*tasks) == [Reserved(0, 0.5)] * 5
        assert wire.sizes == [1, 4]

    play(scenario)


def test_a_budget_is_as_exact_as_without_batches() -> None:
    async def scenario(wire: Wire, batches: LedgerBatches) -> None:
        settings = LedgerSettings.model_validate({"budgets": {"hard": {"usd_per_day": 1.0}}})
        await wire.ledger.configure(settings)
        tasks = [await asked(batches, "reserve", f"t{i}", "ann", bid(0.4)) for i in range(4)]
        wire.may_send.release()
        wire.may_send.release()
        answers = await asyncio.gather(*tasks)
        assert [isinstance(answer, Reserved) for answer in answers] == [True, True, False, False]
        assert wire.ledger.books.accounts.reservations.usd() == {"ann": 0.8}

    play(scenario)


def test_a_request_that_fails_does_not_fail_the_others_of_its_batch() -> None:
    async def scenario(wire: Wire, batches: LedgerBatches) -> None:
        first = await asked(batches, "renew", ["t0"])
        bad = await asked(batches, "reserve", "t1", "ann", [])
        good = await asked(batches, "reserve", "t2", "ann", bid(0.5))
        wire.may_send.release()
        wire.may_send.release()
        assert await first is None
        with pytest.raises(IndexError):
            await bad
        assert await good == Reserved(0, 0.5)

    play(scenario)


def test_all_requests_of_a_lost_batch_fail_and_the_next_are_sent() -> None:
    async def scenario(wire: Wire, batches: LedgerBatches) -> None:
        wire.error = LedgerUnavailable("restarting")
        lost = await asked(batches, "reserve", "t0", "ann", bid(0.5))
        later = await asked(batches, "reserve", "t1", "ann", bid(0.5))
        wire.may_send.release()
        with pytest.raises(LedgerUnavailable):
            await lost
        wire.error = None
        wire.may_send.release()
        assert await later == Reserved(0, 0.5)

    play(scenario)


def test_a_request_whose_caller_gave_up_is_not_sent() -> None:
    async def scenario(wire: Wire, batches: LedgerBatches) -> None:
        first = await asked(batches, "reserve", "t0", "ann", bid(0.5))
        given_up = await asked(batches, "reserve", "t1", "ann", bid(0.5))
        given_up.cancel()
        wire.may_send.release()
        await first
        last = await asked(batches, "reserve", "t2", "ann", bid(0.5))
        wire.may_send.release()
        assert await last == Reserved(0, 0.5)
        assert wire.ledger.books.accounts.reservations.usd() == {"ann": 1.0}  # t0 and t2

    play(scenario)
