"""The ledger as a Ray Serve deployment, shared by all replicas of the endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from prefill_router.common.validation import validate
from prefill_serve.gateway.call_record import CallRecord
from prefill_serve.gateway.state.accounts import Stats
from prefill_serve.gateway.state.call_ledger import Bid, LedgerUnavailable, LocalLedger
from prefill_serve.gateway.state.conversations import Key, MainAgent, Past
from prefill_serve.gateway.state.feedback import Feedback
from prefill_serve.gateway.state.ledger_batches import LedgerBatches, LedgerRequest, answers_of
from prefill_serve.gateway.state.reservations import Exhausted, Reserved
from prefill_serve.settings import LedgerSettings

_TIMEOUT_S = 10.0


@serve.deployment(
    name="Ledger",
    max_ongoing_requests=10_000,
    graceful_shutdown_timeout_s=10.0,
    logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    ray_actor_options={"num_cpus": 0},
)
class SharedLedger(LocalLedger):
    """The ledger's deployment, called through `RemoteLedger`."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self.configure(validate(LedgerSettings, user_config, "ledger"))

    async def answers(self, requests: Sequence[LedgerRequest]) -> list[Any]:
        """The answers to a replica's batch."""
        return await answers_of(self, requests)

    async def __del__(self) -> None:
        await self.close()


class RemoteLedger:
    """A replica's client of the shared ledger. Calls raise what LocalLedger's do, and LedgerUnavailable.

    Requests that the ledger answers at once go in batches; those that may wait for another call, or the disk, do not.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._batches = LedgerBatches(lambda requests: self._call("answers", requests))

    async def past(self, keys: Sequence[Key], main: MainAgent | None = None) -> Past | None:
        return await self._batches.ask("past", keys, main)  # type: ignore[no-any-return]

    async def target_of_answer(self, key: Key) -> str | None:
        return await self._call("target_of_answer", key)  # type: ignore[no-any-return]

    async def reserve(self, ticket: str, caller: str, bids: Sequence[Bid]) -> Reserved | Exhausted:
        return await self._batches.ask("reserve", ticket, caller, bids)  # type: ignore[no-any-return]

    async def renew(self, tickets: Sequence[str]) -> None:
        await self._batches.ask("renew", tickets)

    async def record(
        self, record: CallRecord, keys: Sequence[Key], ticket: str = "", main: MainAgent | None = None
    ) -> None:
        await self._batches.ask("record", record, keys, ticket, main)

    async def feedback(self, given: Feedback, caller: str) -> bool:
        return await self._call("feedback", given, caller)  # type: ignore[no-any-return]

    async def stats(self, caller: str | None) -> Stats:
        return await self._call("stats", caller)  # type: ignore[no-any-return]

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await getattr(self._handle, method).remote(*arguments)
        except RayTaskError as error:
            raise error.cause from None
        except (RayError, TimeoutError) as error:
            raise LedgerUnavailable(str(error)) from error
