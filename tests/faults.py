"""A proxy in front of the S3 server of `s3.py` with the faults of real stores: errors, resets, cut bodies, silence.

It forwards the Host header and the raw path unchanged, so that signatures stay valid.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from loopback import LoopbackServer, Lost, reset
from prefill_router.storage import uris

# Headers of one connection: the proxy has separate connections on its two sides.
_HOP_BY_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding", "Expect", "Content-Length")
_ERRORS = {
    "error_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting conditional operation is in progress."),
}


@dataclass(frozen=True)
class Faults:
    """The probability of each fault; a request gets at most one."""

    error_500: float = 0.0
    slow_down: float = 0.0  # 503
    conflict: float = 0.0  # 409, as for a conditional write during another write
    reset_before: float = 0.0  # the server never sees the request
    reset_after: float = 0.0  # the server handles the request, but its answer is lost
    cut_body: float = 0.0  # closes the connection after half of the answer's body; without a body, before the answer
    black_hole: float = 0.0  # never reads the request's body and never answers

    def draw(self, rng: random.Random) -> str:
        """The name of a random fault, or an empty string."""
        point = rng.random()
        for field in fields(self):
            point -= getattr(self, field.name)
            if point < 0:
                return field.name
        return ""


@dataclass
class Request:
    """One request that the proxy received."""

    time: float  # time.monotonic() on arrival
    method: str
    path: str  # raw, with the bucket and the query
    fault: str  # the field of `Faults` that was applied, or empty
    status: int = 0  # of the answer; 0 if there is none yet


class FaultProxy(LoopbackServer):
    """The proxy. `faults`, `only` and `latency_s` may be set at any time."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        super().__init__()
        self.upstream = upstream
        self.faults = Faults()
        self.only: Callable[[str, str], bool] = (
            _any_request  # filters by method and path the requests that may get a fault
        )
        self.latency_s = 0.0  # of every request
        self.log: list[Request] = []
        self._rng = random.Random(seed)

    def requests(self, method: str, prefix: str = "") -> list[Request]:
        """The requests for keys with this prefix, escaped as in a URL; a listing is a GET of the empty key."""
        return [request for request in self.log if request.method == method and _key(request).startswith(prefix)]

    def puts(self, prefix: str = "") -> list[Request]:
        return self.requests("PUT", prefix)

    def gets(self, prefix: str = "") -> list[Request]:
        return self.requests("GET", prefix)

    def faulted(self) -> list[Request]:
        return [request for request in self.log if request.fault]

    async def app(self) -> web.Application:
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.cleanup_ctx.append(self._with_client)
        return app

    async def _with_client(self, _app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(auto_decompress=False, connector=connector) as self._client:
            yield

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self.faults.draw(self._rng) if self.only(request.method, request.raw_path) else ""
        entry = Request(time.monotonic(), request.method, request.raw_path, fault)
        self.log.append(entry)
        try:
            response = await self._answer(request, fault)
        except Lost:
            reset(request)
            return web.Response()  # never reaches the client
        entry.status = response.status
        return response

    async def _answer(self, request: web.Request, fault: str) -> web.StreamResponse:
        await asyncio.sleep(self.latency_s)
        if fault == "black_hole":
            await asyncio.Event().wait()
        if fault == "reset_before":
            raise Lost
        body = await request.read()
        if fault in _ERRORS:
            return _error(*_ERRORS[fault])
        response = await self._ask_upstream(request, body)
        if fault == "reset_after":
            raise Lost
        if fault == "cut_body":
            return await _send_half(request, response)
        return response

    async def _ask_upstream(self, request: web.Request, body: bytes) -> web.Response:
        url = URL(self.upstream + request.raw_path, encoded=True)
        headers, data = _end_to_end(request.headers), io.BytesIO(body) if body else None
        async with self._client.request(
            request.method, url, headers=headers, data=data, skip_auto_headers=["Content-Type", "User-Agent"]
        ) as answer:
            response = web.Response(status=answer.status, headers=_end_to_end(answer.headers), body=await answer.read())
            if request.method == "HEAD":
                response.headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            return response


def _any_request(_method: str, _path: str) -> bool:
    return True


def _key(request: Request) -> str:
    return request.path.partition("?")[0].removeprefix("/").partition("/")[2]


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def _error(status: int, code: str, message: str) -> web.Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, body=body.encode(), content_type="application/xml")


async def _send_half(request: web.Request, whole: web.Response) -> web.StreamResponse:
    body = whole.body if isinstance(whole.body, bytes) and request.method != "HEAD" else b""
    if not body:
        raise Lost
    cut = web.StreamResponse(status=whole.status, headers=whole.headers)
    cut.content_length = len(body)
    await cut.prepare(request)
    await cut.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return cut


@contextmanager
def fault_proxy(seed: int = 0) -> Iterator[FaultProxy]:
    """Puts a proxy between the server of `s3_bucket` and this process and its children, Ray workers included."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], seed) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        uris._s3.cache_clear()
        try:
            yield proxy
        finally:
            uris._s3.cache_clear()


@pytest.fixture
def faulty_s3(s3_bucket: str) -> Iterator[FaultProxy]:
    """A proxy in front of `s3_bucket`, used by its URIs. It has no faults until a test sets them."""
    with fault_proxy() as proxy:
        yield proxy
