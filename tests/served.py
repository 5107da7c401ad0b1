"""The endpoint's API in this process, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.testclient import TestClient

from prefill_serve.endpoint import RECORD_AFTER_S, Endpoint
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.settings import LedgerSettings, Settings


class Api:
    """A test client with its endpoint and ledger."""

    def __init__(self, client: TestClient, endpoint: Endpoint, ledger: LocalLedger) -> None:
        self.client, self.endpoint, self.ledger = client, endpoint, ledger

    def configure(self, **settings: Any) -> None:
        assert self.client.portal is not None
        self.client.portal.call(self.endpoint.configure, Settings.model_validate({"open": True, **settings}))

    def keep(self, **settings: Any) -> None:
        """Changes the settings of the ledger."""
        assert self.client.portal is not None
        self.client.portal.call(self.ledger.configure, LedgerSettings.model_validate(settings))

    def settle(self) -> None:
        """Waits until all requests are recorded."""
        assert self.client.portal is not None
        self.client.portal.call(asyncio.sleep, 10 * RECORD_AFTER_S)

    def post(self, body: Any, path: str = "/v1/route", **options: Any) -> Any:
        return self.client.post(path, json=body, **options)
