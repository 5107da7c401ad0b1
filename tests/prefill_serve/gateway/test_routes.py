"""A caller that disconnects just as its answer arrives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prefill_serve.gateway.relay import Relay
from prefill_serve.gateway.routes import unless_disconnected


class Waiting:
    """A request without a disconnect message."""

    async def receive(self) -> Any:
        await asyncio.Event().wait()


def test_an_answer_that_comes_as_its_caller_is_gone_is_ended_and_recorded() -> None:
    ended: list[tuple[Any, ...]] = []
    active: Any = "the call"
    stream: Any = "its stream"

    async def scenario() -> None:
        async def answering() -> Any:
            serving.cancel()  # Ray Serve's way to report a disconnect
            return Relay(active, stream, {}, lambda *what: ended.append(what))

        request: Any = Waiting()
        serving = asyncio.create_task(unless_disconnected(request, answering()))
        with pytest.raises(asyncio.CancelledError):
            await serving

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert ended == [("the call", "its stream", "cancelled")]
