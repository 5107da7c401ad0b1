"""Batches of a replica's requests to the shared ledger: one message at a time carries all that came meanwhile.

A message between processes costs several times what the ledger does with it. An idle replica's request still leaves at
once, and requests keep their order: a call is recorded before its conversation is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from prefill_serve.gateway.state.call_ledger import CallLedger

_MOST = 256  # in a message


class LedgerRequest(NamedTuple):
    """A method of the ledger that answers at once, and its arguments."""

    method: str
    arguments: tuple[Any, ...]


async def answers_of(ledger: CallLedger, requests: Sequence[LedgerRequest]) -> list[Any]:
    """The ledger's answers in order; a request that fails has its exception as answer."""
    return [await _answer_of(ledger, request) for request in requests]


async def _answer_of(ledger: CallLedger, request: LedgerRequest) -> Any:
    try:
        return await getattr(ledger, request.method)(*request.arguments)
    except Exception as error:
        return error


class LedgerBatches:
    """Sends requests in batches, by `send`, which returns what `answers_of` does. Bound to one event loop."""

    def __init__(self, send: Callable[[list[LedgerRequest]], Awaitable[list[Any]]]) -> None:
        self._send = send
        self._waiting: list[tuple[LedgerRequest, asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def ask(self, method: str, *arguments: Any) -> Any:
        """The ledger's answer. Raises what the method or `send` raises; the latter for all requests of the batch."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((LedgerRequest(method, arguments), answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())
        return await answer

    async def _send_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
            batch = [(request, answer) for request, answer in batch if not answer.done()]  # not given up
            try:
                answers = await self._send([request for request, _ in batch]) if batch else []
            except Exception as error:
                answers = [error] * len(batch)
            for (_, waiting), answer in zip(batch, answers, strict=True):
                if waiting.done():
                    continue
                if isinstance(answer, Exception):
                    waiting.set_exception(answer)
                else:
                    waiting.set_result(answer)
