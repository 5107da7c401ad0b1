"""Paths that are answered without FastAPI's layers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from prefill_serve.middleware.direct_paths import DirectPaths


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says that it was asked, what with, and in how many pieces."""
    body = (await Request(scope, receive).body()).decode()
    await PlainTextResponse(f"app: {body}")(scope, receive, send)


async def direct(request: Request) -> Response | None:
    body = (await request.body()).decode()
    if body == "error":
        raise ValueError(body)
    return None if body == "leave" else PlainTextResponse(f"direct: {body}")


def on_error(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"error: {error!r}", 400)


PATHS = DirectPaths(app, {"/hot": direct}, on_error)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "answer"),
    [
        ("POST", "/hot", "one", 200, "direct: one"),
        ("POST", "/hot", "leave", 200, "app: leave"),
        ("POST", "/hot", "error", 400, "error: ValueError('error')"),
        ("PUT", "/hot", "one", 200, "app: one"),
        ("POST", "/hot/", "one", 200, "app: one"),
        ("POST", "/below/hot", "one", 200, "app: one"),
    ],
)
def test_posts_to_a_direct_path_pass_by_the_app(method: str, path: str, body: str, status: int, answer: str) -> None:
    response = TestClient(PATHS).request(method, path, content=body)
    assert (response.status_code, response.text) == (status, answer)


def test_a_path_is_the_label_of_its_route_in_metrics() -> None:
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/hot", "headers": []}

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(PATHS(scope, receive, send))
    assert scope["route"].path == "/hot"
    assert (sent[0]["status"], sent[1]["body"]) == (400, f"error: {ClientDisconnect()!r}".encode())
