"""The client for scripts, against a busy endpoint."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from ports import free_port
from prefill_serve.client import RouteError, RouterClient


def test_a_busy_endpoint_says_when_to_come_again_in_seconds_or_as_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)
    answers = [httpx.Response(429, headers={"retry-after": after}) for after in ("7", later)]
    with RouterClient(attempts=1) as client:
        monkeypatch.setattr(client._http, "post", lambda *_, **__: answers.pop(0))
        waits_s = []
        for _ in range(2):
            with pytest.raises(RouteError) as caught:
                client.route("What is 17 * 23?")
            waits_s.append(caught.value.retry_after_s or 0.0)
    assert waits_s[0] == 7.0
    assert 500.0 < waits_s[1] <= 600.0


def test_an_address_without_an_endpoint_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with RouterClient(url, attempts=1) as client, pytest.raises(httpx.ConnectError, match=f"no endpoint at {url}"):
        client.route("What is 17 * 23?")
