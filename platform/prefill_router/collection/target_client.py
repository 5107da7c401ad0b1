"""Makes one attempt at a call: returns the answer, or why there is none, whether it may be billed and when to retry."""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import dataclass
from time import monotonic

import httpx

from prefill_router.collection.target_calls import TargetAnswer, TargetCall, parse_answer
from prefill_router.common.redaction import redacted
from prefill_router.policy.pool import Upstream
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_router.upstreams.translation.whole_answers import chat_answer
from prefill_router.upstreams.transport import UnreadableAnswer, content_of, is_passing, post_request, retry_after_s

_MAX_BACKOFF_S = 120.0
_NO_QUOTA = "insufficient_quota"
_CODE = re.compile(r"[A-Za-z_]{1,60}")  # an error's code, the only part of an upstream's error that is kept


@dataclass(frozen=True)
class Miss:
    """A failed attempt. `may_be_paid` if the upstream may have billed an answer that did not arrive."""

    reason: str
    is_final: bool = False  # a retry is useless
    may_be_paid: bool = False
    retry_after_s: float | None = None


async def ask(call: TargetCall, http: httpx.AsyncClient) -> TargetAnswer | Miss:
    """Makes one attempt at a call."""
    upstream = call.target.upstream
    assert upstream is not None
    try:
        content = call.body()
    except Untranslatable as error:
        return Miss(f"the upstream's protocol cannot express {error}", is_final=True)
    request = post_request(upstream, call.path, content, {"idempotency-key": call.key})
    started_s = monotonic()
    try:
        async with asyncio.timeout(upstream.timeout_s):
            response = await http.send(request, stream=True)
            try:
                content = await content_of(response)
            finally:
                await response.aclose()
    except httpx.ConnectError:
        return Miss("no connection")
    except (TimeoutError, httpx.TimeoutException):
        return Miss(f"no answer within {upstream.timeout_s:g} s", may_be_paid=True)
    except UnreadableAnswer as error:
        return Miss(str(error), may_be_paid=True)
    except (httpx.HTTPError, OSError) as error:
        return Miss(f"the connection failed: {type(error).__name__}", may_be_paid=True)
    return _read(response, content, upstream, monotonic() - started_s)


def backoff_s(attempt: int, miss: Miss, rng: random.Random) -> float:
    """Returns how long to wait after attempt number `attempt`, counted from 1.

    Uses the upstream's Retry-After if it is above 0. Otherwise draws up to a bound that doubles with each attempt, so
    that calls that failed together are not retried together.
    """
    if miss.retry_after_s:
        return min(miss.retry_after_s * (1.0 + 0.1 * rng.random()), _MAX_BACKOFF_S)
    return rng.random() * min(0.5 * 2.0**attempt, _MAX_BACKOFF_S)


def _read(response: httpx.Response, content: bytes, upstream: Upstream, latency_s: float) -> TargetAnswer | Miss:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if response.status_code != httpx.codes.OK:
        return _refusal(response, body, upstream.key)
    if not isinstance(body, dict):
        return Miss("answered 200 with invalid JSON", may_be_paid=True)
    if body.get("error"):
        return Miss("answered 200 with an error", may_be_paid=True)
    try:
        chat = body if upstream.protocol == "openai" else {**chat_answer(body), "usage": body.get("usage")}
        answer = parse_answer(chat, latency_s)
    except Untranslatable:
        answer = None
    return answer if answer is not None else Miss("answered 200 without a choice", may_be_paid=True)


def _refusal(response: httpx.Response, body: object, key: str | None) -> Miss:
    status = response.status_code
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    is_final = not is_passing(status) or code == _NO_QUOTA
    shown = f" {redacted(code, key)}" if isinstance(code, str) and _CODE.fullmatch(code) else ""
    return Miss(
        f"status {status}{shown}", is_final=is_final, retry_after_s=retry_after_s(response.headers.get("retry-after"))
    )
