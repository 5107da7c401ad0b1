"""Statuses and Retry-After of upstreams, and the client that calls them."""

from __future__ import annotations

import asyncio
import gzip
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
import pytest
from aiohttp import web
from httpx_aiohttp import AiohttpTransport
from hypothesis import example, given
from hypothesis import strategies as st

from loopback import LoopbackServer
from prefill_router.policy.pool import Upstream
from prefill_router.upstreams.transport import (
    LONGEST_RETRY_AFTER_S,
    UnreadableAnswer,
    content_of,
    http_client,
    is_callers_fault,
    is_passing,
    post_request,
    retry_after_s,
)

NOW = datetime(2026, 11, 29, 12, 0, 0, tzinfo=UTC)
DATES = r"\w{3}, \d{1,2} \w{3} \d{1,9} \d\d:\d\d:\d\d [A-Z+-]\w{0,9}"


def in_seconds(seconds: float) -> str:
    return format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("nan", None),
        ("1e9", None),
        ("²", None),
        ("٣", None),
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("9" * 5000, LONGEST_RETRY_AFTER_S),
        (in_seconds(30), 30.0),
        (in_seconds(30).replace("GMT", "-0000"), 30.0),
        (in_seconds(-30), 0.0),
        (in_seconds(86400 * 365), LONGEST_RETRY_AFTER_S),
        ("Sunday, 29-Nov-26 12:00:30 GMT", 30.0),
        ("Sun Nov 29 12:00:30 2026", 30.0),
        ("Sun, 99 Nov 2026 12:00:30 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 -2359", LONGEST_RETRY_AFTER_S),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


@given(st.text() | st.from_regex(DATES, fullmatch=True))
@example("Sun, 29 Nov 99999999999999999999 12:00:30 GMT")
@example("Sun, 29 Nov 2026 12:00:30 +9999999999")
def test_no_retry_after_is_negative_or_without_end(value: str) -> None:
    seconds = retry_after_s(value, NOW)
    assert seconds is None or 0.0 <= seconds <= LONGEST_RETRY_AFTER_S


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529, 599])
def test_what_may_be_answered_at_another_try_is_not_the_callers_fault(status: int) -> None:
    assert is_passing(status)
    assert not is_callers_fault(status)


@pytest.mark.parametrize("status", [400, 405, 413, 415, 422])
def test_what_every_upstream_would_refuse_is_the_callers_fault(status: int) -> None:
    assert is_callers_fault(status)
    assert not is_passing(status)


@pytest.mark.parametrize("status", [204, 301, 401, 402, 403, 404, 410, 418])
def test_what_another_target_may_answer_is_neither(status: int) -> None:
    assert not is_passing(status)
    assert not is_callers_fault(status)


def test_the_client_opens_as_many_connections_as_there_are_calls() -> None:
    """Each upstream has its own limit. aiohttp's default would be 100 connections for all."""

    async def scenario() -> int:
        async with http_client() as http:
            assert isinstance(http._transport, AiohttpTransport)
            async with http._transport.get_client() as session:
                assert isinstance(session.connector, aiohttp.TCPConnector)
                return session.connector.limit

    assert asyncio.run(scenario()) > 100_000


def test_a_request_of_anthropics_protocol_has_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_KEY", "sk-1")
    upstream = Upstream(base_url="http://localhost/v1", key_env="SMALL_KEY", protocol="anthropic")
    request = post_request(upstream, "/messages", b"{}")
    assert (request.headers["x-api-key"], request.headers["anthropic-version"]) == ("sk-1", "2023-06-01")
    assert "authorization" not in request.headers


def test_a_request_has_the_upstreams_url_headers_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_KEY", "sk-1")
    upstream = Upstream(base_url="http://localhost/v1/", key_env="SMALL_KEY", timeout_s=7.0)
    upstream = upstream.model_copy(update={"headers": {"x-tier": "flex"}})
    request = post_request(upstream, "/chat/completions", b"{}", {"idempotency-key": "k"})
    assert str(request.url) == "http://localhost/v1/chat/completions"
    assert (request.headers["authorization"], request.headers["idempotency-key"]) == ("Bearer sk-1", "k")
    assert request.headers["x-tier"] == "flex"
    assert request.content == b"{}"
    assert request.extensions["timeout"]["read"] == 7.0
    assert request.extensions["timeout"]["connect"] == 5.0


class Redirecting(LoopbackServer):
    """A server that redirects every request to another server."""

    def __init__(self, status: int, to: str) -> None:
        super().__init__()
        self.status, self.to, self.num_asked = status, to, 0

    async def app(self) -> web.Application:
        async def redirect(request: web.Request) -> web.Response:
            self.num_asked += 1
            return web.Response(status=self.status, headers={"location": f"{self.to}{request.path}"})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", redirect)
        return app


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_key_elsewhere(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Redirects are never followed, so requests go only to the base URL."""
    monkeypatch.setenv("SMALL_KEY", "sk-1")

    async def scenario(url: str) -> int:
        async with http_client() as http:
            upstream = Upstream(base_url=url, key_env="SMALL_KEY")
            return (await http.send(post_request(upstream, "/chat/completions", b"{}"))).status_code

    with Redirecting(500, "") as other, Redirecting(status, other.url) as first:
        assert asyncio.run(scenario(first.url)) == status
        assert (first.num_asked, other.num_asked) == (1, 0)


class Hostile(LoopbackServer):
    """A server that sets a cookie with every answer, and answers at any length, compressed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.cookies: list[str | None] = []
        self.num_sent = 0

    async def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.cookies.append(request.headers.get("cookie"))
        headers = {"content-encoding": "gzip"} if request.path == "/gzip" else {}
        response = web.StreamResponse(headers={"set-cookie": "session=ann; Path=/", **headers})
        await response.prepare(request)
        piece = gzip.compress(bytes(1 << 20)) if request.path == "/gzip" else b"x" * 1000
        for _ in range(100 if request.path != "/short" else 1):
            await response.write(piece)
            self.num_sent += 1
        return response


def test_no_cookie_of_one_call_goes_with_another() -> None:
    async def scenario(url: str) -> None:
        async with http_client() as http:
            upstream = Upstream(base_url=url)
            for _ in range(3):
                (await http.send(post_request(upstream, "/short", b"{}"))).raise_for_status()

    with Hostile() as server:  # aiohttp keeps no cookies of addresses
        asyncio.run(scenario(server.url.replace("127.0.0.1", "localhost")))
    assert server.cookies == [None, None, None]


@pytest.mark.parametrize(
    ("path", "most_bytes", "problem"),
    [
        ("/short", 1000, None),
        ("/short", 999, "more than 999 bytes"),
        ("/long", 2_000, "more than 2,000 bytes"),
        ("/gzip", 1 << 30, "compressed body, which no request accepts"),
    ],
)
def test_an_answer_is_read_up_to_a_limit_and_never_decompressed(
    path: str, most_bytes: int, problem: str | None
) -> None:
    async def scenario(url: str) -> bytes:
        async with http_client() as http:
            response = await http.send(post_request(Upstream(base_url=url), path, b"{}"), stream=True)
            try:
                return await content_of(response, most_bytes)
            finally:
                await response.aclose()

    with Hostile() as server:
        if problem is None:
            assert asyncio.run(scenario(server.url)) == b"x" * 1000
            return
        with pytest.raises(UnreadableAnswer, match=problem):
            asyncio.run(scenario(server.url))
