"""The API in this process, without Ray or sockets, on a real router with the tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from prefill_serve.api import create_api
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.state.call_ledger import LocalLedger
from served import Api


@pytest.fixture(scope="module")
def served(router: str) -> Iterator[Api]:
    endpoint, ledger = Endpoint(), LocalLedger()
    api = create_api(endpoint, ledger)
    with TestClient(api, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield Api(client, endpoint, ledger)


@pytest.fixture
def api(served: Api, router: str) -> Api:
    served.configure(router=router)
    return served
