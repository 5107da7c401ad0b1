"""HTTP to upstreams, the same for `collect` and the gateway: the client, a request, and what a refusal means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
import httpx
from httpx_aiohttp import HttpxAiohttpClient

from prefill_router.policy.pool import Upstream

LONGEST_RETRY_AFTER_S = 3600.0
_CONNECT_S = 5.0
_UNLIMITED = 1 << 20  # aiohttp takes None for 100 connections, and httpx, where there is a proxy, 0 for none
_PASSING = (408, 409, 425, 429)
_CALLERS_OWN = (400, 405, 413, 415, 422)
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")


def http_client() -> httpx.AsyncClient:
    """A client for one event loop. It keeps to the environment's proxies, and leaves limits to who calls."""
    return HttpxAiohttpClient(limits=httpx.Limits(max_connections=_UNLIMITED))


def post_request(
    http: httpx.AsyncClient, upstream: Upstream, path: str, content: bytes, headers: Mapping[str, str] | None = None
) -> httpx.Request:
    """A POST to `path` below the upstream's base URL, with its key and its timeout."""
    timeout = httpx.Timeout(upstream.timeout_s, connect=_CONNECT_S)
    every = {**upstream.headers, **(headers or {})}
    return http.build_request("POST", upstream.url(path), content=content, headers=every, timeout=timeout)


def has_connected(error: BaseException) -> bool:
    """Could the request have reached its upstream? The transport names a refused and a lost connection alike."""
    return not isinstance(error.__cause__, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


def is_passing(status: int) -> bool:
    """Can the same request be answered at another try? True of 408, 409, 425, 429 and 5xx.

    OpenAI's and Anthropic's clients retry these too, but for 425 (RFC 8470, "Too Early"). A completion changes nothing
    that it could be in conflict with: an upstream that says 409 had a lock taken, or the same idempotency key under
    way. That is over a moment later, and nothing that the caller could mend.
    """
    return status in _PASSING or status >= 500


def is_callers_fault(status: int) -> bool:
    """Would every upstream refuse the request, until its caller changes it? True of 400, 405, 413, 415 and 422.

    Not of 401, 402, 403 and 404: a key, a quota or a model's name is wrong in the pool, and another target may answer.
    """
    return status in _CALLERS_OWN


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After asks to wait, from 0 to LONGEST_RETRY_AFTER_S; None where it says nothing readable.

    It may be seconds, fractions of which some upstreams send, or an HTTP date (RFC 9110, 10.2.3).
    """
    said = (value or "").strip()
    if _SECONDS.fullmatch(said):
        seconds = float(said)
    else:
        try:
            then = parsedate_to_datetime(said)
            then = then if then.tzinfo else then.replace(tzinfo=UTC)
            seconds = (then - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
