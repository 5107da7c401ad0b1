"""Answers the busiest paths without FastAPI's layers, which cost as much as the gateway does.

FastAPI keeps the same routes, for its document, other methods, and applications below another prefix.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Answer = Callable[[Request], Awaitable[Response | None]]  # None leaves the request to FastAPI


class DirectPath(NamedTuple):
    """The label of a route in metrics."""

    path: str


class DirectPaths:
    """ASGI app that answers POST requests of the paths of `answers` itself, and passes all others to `app`."""

    def __init__(
        self, app: ASGIApp, answers: Mapping[str, Answer], on_error: Callable[[Request, Exception], Response]
    ) -> None:
        self.app, self.on_error = app, on_error
        self.answers = {path: (DirectPath(path), answer) for path, answer in answers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self.answers.get(scope["path"]) if scope.get("method") == "POST" else None
        if found is None:
            await self.app(scope, receive, send)
            return
        scope["route"], answer = found
        request = Request(scope, receive, send)
        try:
            response = await answer(request)
        except Exception as error:
            response = self.on_error(request, error)
        if response is None:
            await self.app(scope, _Again(await request.body(), receive), send)
        else:
            await response(scope, receive, send)


class _Again:
    """The `receive` of a request whose body has been read."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._messages: list[Message] = [{"type": "http.request", "body": body}]
        self._receive = receive

    async def __call__(self) -> Message:
        return self._messages.pop() if self._messages else await self._receive()
