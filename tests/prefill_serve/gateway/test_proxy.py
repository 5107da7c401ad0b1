"""Reservations of calls in progress; test_gateway covers the rest of the proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from prefill_serve.gateway.active_call import ActiveCall, Caller
from prefill_serve.gateway.candidates import FixedPlan
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.proxy import Proxy
from prefill_serve.gateway.state.call_ledger import Bid, LocalLedger


class Watched(LocalLedger):
    def __init__(self) -> None:
        super().__init__()
        self.renewed: asyncio.Queue[Sequence[str]] = asyncio.Queue()

    async def renew(self, tickets: Sequence[str]) -> None:
        await super().renew(tickets)
        self.renewed.put_nowait(tickets)


@pytest.mark.parametrize("closes", [False, True])
def test_a_reservation_is_renewed_while_its_call_is_under_way(monkeypatch: pytest.MonkeyPatch, closes: bool) -> None:
    monkeypatch.setattr("prefill_serve.gateway.proxy._RENEW_S", 0.001)
    endpoint: Any = None  # unused

    async def scenario() -> None:
        ledger = Watched()
        proxy = Proxy(endpoint, ledger)
        active = ActiveCall(ChatCall({}), Caller("ann", "r"), FixedPlan(["t"], 0), {}, [])
        ticket = active.ticket
        await proxy._reserve(active, [Bid("t", 0.5)])
        for _ in range(3):
            assert await ledger.renewed.get() == [ticket]
        assert (await ledger.stats("ann")).reserved_usd == 0.5
        renewing = proxy._renewing
        assert renewing is not None
        if closes:
            await proxy.close()
        else:
            del active  # a call without references is no longer in progress
        await asyncio.wait({renewing})
        assert renewing.cancelled() == closes

    asyncio.run(asyncio.wait_for(scenario(), 30))
