"""Asks an upstream once: its answer, or what went wrong, whether that may be paid for, and when to try again."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass
from time import monotonic

import httpx

from prefill_router.collection.target_calls import TargetAnswer, TargetCall, parse_answer
from prefill_router.upstreams.redaction import redacted
from prefill_router.upstreams.transport import is_passing, post_request, retry_after_s

_LONGEST_S = 120.0  # that is waited before another attempt
_NO_QUOTA = "insufficient_quota"
_CODE = re.compile(r"[A-Za-z_]{1,60}")  # of an error: all that is kept of an upstream's words


@dataclass(frozen=True)
class Miss:
    """There is no answer. `may_be_paid` where the upstream may have made one that did not arrive."""

    reason: str
    is_final: bool = False  # no use to try again
    may_be_paid: bool = False
    retry_after_s: float | None = None


async def ask(call: TargetCall, http: httpx.AsyncClient) -> TargetAnswer | Miss:
    """One attempt at a call."""
    upstream = call.target.upstream
    assert upstream is not None
    request = post_request(http, upstream, "/chat/completions", call.body(), {"idempotency-key": call.key})
    started_s = monotonic()
    try:
        async with asyncio.timeout(upstream.timeout_s):
            response = await http.send(request)
    except httpx.ConnectError:
        return Miss("no connection")
    except (TimeoutError, httpx.TimeoutException):
        return Miss(f"no answer within {upstream.timeout_s:g} s", may_be_paid=True)
    except (httpx.HTTPError, OSError) as error:
        return Miss(f"the connection failed: {type(error).__name__}", may_be_paid=True)
    return _read(response, upstream.key, monotonic() - started_s)


def backoff_s(attempt: int, miss: Miss, rng: random.Random) -> float:
    """How long to wait after attempt number `attempt`, from 1: as the upstream says, or, where it says nothing or at
    once, at random up to a bound that doubles, so that those who failed together do not come again together."""
    if miss.retry_after_s:
        return min(miss.retry_after_s * (1.0 + 0.1 * rng.random()), _LONGEST_S)
    return rng.random() * min(0.5 * 2.0**attempt, _LONGEST_S)


def _read(response: httpx.Response, key: str | None, latency_s: float) -> TargetAnswer | Miss:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code != httpx.codes.OK:
        return _refusal(response, body, key)
    if not isinstance(body, dict):
        return Miss("answered 200 with what is no JSON", may_be_paid=True)
    if body.get("error"):
        return Miss("answered 200 with an error", may_be_paid=True)
    answer = parse_answer(body, latency_s)
    return answer if answer is not None else Miss("answered 200 without a choice", may_be_paid=True)


def _refusal(response: httpx.Response, body: object, key: str | None) -> Miss:
    status = response.status_code
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    is_final = not is_passing(status) or code == _NO_QUOTA
    said = f" {redacted(code, key)}" if isinstance(code, str) and _CODE.fullmatch(code) else ""
    return Miss(
        f"status {status}{said}", is_final=is_final, retry_after_s=retry_after_s(response.headers.get("retry-after"))
    )
