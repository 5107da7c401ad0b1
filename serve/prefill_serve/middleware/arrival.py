"""Arrival of a body: whole within a time, or a caller that sends a byte now and then would hold a place for ever."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

MOST_S = 60.0


def in_time(receive: Receive, late: Exception, seconds: float = MOST_S) -> Receive:
    """`receive` that raises `late` unless the whole body is there so many seconds after it was first asked for."""
    deadline, is_whole = 0.0, False

    async def received() -> Message:
        nonlocal deadline, is_whole
        if is_whole:  # what comes now is that the caller leaves, which may take as long as the answer
            return await receive()
        deadline = deadline or asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise late from None
        is_whole = not message.get("more_body", False)
        return message

    return received
