"""HTTP to upstreams: the client, requests, bounded answers, and how to treat error statuses and Retry-After."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from prefill_router.policy.pool import Upstream

LONGEST_RETRY_AFTER_S = 3600.0
MAX_ANSWER_BYTES = 16 << 20  # of a whole answer, or of one event, which may hold one with images
_CONNECT_S = 5.0
_UNLIMITED = 1 << 20  # for aiohttp, None means 100 connections; for httpx behind a proxy, 0 means none
_RETRYABLE = (408, 409, 425, 429)
_CALLERS_FAULT = (400, 405, 413, 415, 422)
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")


class UnreadableAnswer(httpx.HTTPError):
    """An answer is too long, or compressed although no request allows that."""


class _Transport(AiohttpTransport):
    """Keeps no cookies in aiohttp's session."""

    def get_client(self) -> aiohttp.ClientSession:
        session = super().get_client()
        connector = session.connector
        session.detach()
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


class _Client(httpx.AsyncClient):
    """A client by aiohttp, with the environment's proxies. All callers share it, so it accepts no cookies."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=_UNLIMITED))

    async def send(self, request: httpx.Request, *, stream: bool = False, **_: Any) -> httpx.Response:
        """Sends a request once, as it is: cookies, redirects and logins would cost time and are not wanted."""
        response = await self._transport_for_url(request.url).handle_async_request(request)
        if not stream:
            await response.aread()
        return response

    def _init_transport(self, **options: Any) -> httpx.AsyncBaseTransport:  # type: ignore[override]
        return _Transport(**options)

    def _init_proxy_transport(  # type: ignore[override]
        self, proxy: httpx.Proxy, **options: Any
    ) -> httpx.AsyncBaseTransport:
        return _Transport(proxy=proxy, **options)


def http_client() -> httpx.AsyncClient:
    """Creates a client for one event loop. It uses the environment's proxies; the caller limits concurrency."""
    return _Client()


async def content_of(response: httpx.Response, most_bytes: int = MAX_ANSWER_BYTES) -> bytes:
    """Reads a response's body. Raises UnreadableAnswer without decompressing, as few bytes may become many."""
    require_uncompressed(response)
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > most_bytes:
            raise UnreadableAnswer(f"answered with more than {most_bytes:,} bytes")
    return bytes(content)


def require_uncompressed(response: httpx.Response) -> None:
    """Raises UnreadableAnswer for a compressed body: every request accepts `identity` only."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnreadableAnswer("answered with a compressed body, which no request accepts")


def post_request(
    upstream: Upstream, path: str, content: bytes, headers: Mapping[str, str] | None = None
) -> httpx.Request:
    """Builds a POST to `path` under the upstream's base URL, with its key and timeout."""
    timeout = {"connect": _CONNECT_S, "read": upstream.timeout_s, "pool": upstream.timeout_s}
    all_headers = {**upstream.request_headers, **(headers or {})}
    url, extensions = _parsed(upstream.url(path)), {"timeout": timeout}
    return httpx.Request("POST", url, content=content, headers=all_headers, extensions=extensions)


@lru_cache
def _parsed(url: str) -> httpx.URL:
    """A parsed URL, which takes longer than the rest of a request."""
    return httpx.URL(url)


def has_connected(error: BaseException) -> bool:
    """Returns whether a failed request may have reached its upstream.

    httpx raises the same error for a refused and a lost connection; the aiohttp cause tells them apart.
    """
    return not isinstance(error.__cause__, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


def is_passing(status: int) -> bool:
    """Returns whether a retry of the same request may succeed: true for 408, 409, 425, 429 and 5xx.

    OpenAI's and Anthropic's clients retry the same statuses, except 425 (RFC 8470, "Too Early"). 409 is retryable
    because a completion has no state to conflict with: the upstream had a lock taken, or the same idempotency key in
    progress. Both pass soon, and the caller can fix neither.
    """
    return status in _RETRYABLE or status >= 500


def is_callers_fault(status: int) -> bool:
    """Returns whether a status is about the request, which another model may accept: 400, 405, 413, 415 and 422.

    False for 401, 402, 403 and 404: a key, quota or model name in the pool is wrong, and another target may answer.
    """
    return status in _CALLERS_FAULT


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Parses a Retry-After header to seconds, clamped to 0 and LONGEST_RETRY_AFTER_S; None if missing or invalid.

    Accepts seconds, with the fractions that some upstreams send, and HTTP dates (RFC 9110, 10.2.3).
    """
    text = (value or "").strip()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    else:
        try:
            then = parsedate_to_datetime(text)
            then = then if then.tzinfo else then.replace(tzinfo=UTC)
            seconds = (then - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
