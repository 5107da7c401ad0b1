"""Sends calls to one target's upstream, limits concurrency, and feeds its circuit breaker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic

import httpx

from prefill_router.policy.answer_times import MeasuredTimes
from prefill_router.policy.pool import Target
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_router.upstreams.transport import (
    UnreadableAnswer,
    content_of,
    has_connected,
    post_request,
    require_uncompressed,
    retry_after_s,
)
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.failure_judge import FailureJudge
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import Body, json_object
from prefill_serve.gateway.refused_fields import RefusedFields
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_errors import error_answer
from prefill_serve.gateway.upstream_failures import UpstreamFailure
from prefill_serve.gateway.upstream_stream import UpstreamStream

_MAX_ERROR_BYTES = 64 << 10  # of an error's body; a longer one is not read
_SLOT_S = 1.0  # how long a call waits at an upstream at its concurrency limit
_MAY_BILL = (408, 504)  # a proxy's timeout: the upstream behind it may still bill
_PROBE_S = 10.0
_PROBE = [{"role": "user", "content": "Hi"}]


class Channel:
    """One target's upstream, for one event loop. Calls raise UpstreamFailure."""

    def __init__(self, target: Target, http: httpx.AsyncClient, breaker: Breaker | None = None) -> None:
        assert target.upstream is not None
        self.target, self.upstream, self.http = target, target.upstream, http
        self.breaker = Breaker() if breaker is None else breaker
        self._judge = FailureJudge(target, self.breaker)
        self.refused = RefusedFields()
        self._slots = asyncio.Semaphore(self.upstream.concurrency)

    @property
    def is_ready(self) -> bool:
        """Whether a call can be sent now."""
        return not self.breaker.is_open and not self._slots.locked()

    async def answer(self, attempt: Attempt) -> Body:
        """Sends a call and returns the whole answer."""
        async with self._in_time(attempt):
            response = await self._send(attempt)
            try:
                body = json_object(await content_of(response))
                measured = MeasuredTimes(None, monotonic() - attempt.sent_s)
            finally:
                await self.release(response)
        if not body:
            raise self._judge.failure(attempt, "malformed", "answered with invalid JSON")
        if (said := attempt.call.error(body)) is not None:
            refusal = self._judge.early_refusal(attempt, body)
            raise refusal or self._judge.failure(attempt, "error", "answered 200 with an error", said=said)
        attempt.usage, translation = attempt.call.usage(body), attempt.translation
        if translation is not None and translation.answer is not None:
            try:
                body = translation.answer(body)
            except Untranslatable as error:
                raise self._judge.untranslatable(attempt, error) from None
        self.breaker.succeed()
        attempt.measured = measured
        return body

    async def stream(self, attempt: Attempt) -> UpstreamStream:
        """Sends a call and returns the answer once its first event has arrived."""
        async with self._in_time(attempt):
            stream = UpstreamStream(self._judge, attempt, await self._send(attempt), self.release)
            try:
                await stream.begin()
            except BaseException:
                await stream.close()
                raise
            return stream

    async def probe(self) -> None:
        """Requests one token and reports to the breaker whether the upstream answers."""
        make = ChatCall if self.upstream.protocol == "openai" else MessagesCall
        call = make({"messages": _PROBE}, answer_tokens=1)
        request = post_request(self.upstream, call.path, call.for_upstream(self.target))
        try:
            async with asyncio.timeout(min(self.upstream.timeout_s, _PROBE_S)):
                response = await self.http.send(request, stream=True)
                try:
                    content = await content_of(response)
                finally:
                    await response.aclose()
        except Exception:
            self.breaker.fail_probe()
            return
        body = json_object(content)
        is_refused = self._judge.refusal(response.status_code, error_answer(content)) is not None
        if is_refused or (response.is_success and body and call.error(body) is None):
            self.breaker.pass_probe()
        else:
            self.breaker.fail_probe(retry_after_s(response.headers.get("retry-after")) or 0.0)

    @asynccontextmanager
    async def _in_time(self, attempt: Attempt) -> AsyncIterator[None]:
        """Turns errors and timeouts inside into failures of the upstream."""
        try:
            async with asyncio.timeout(self.upstream.timeout_s):
                yield
        except UpstreamFailure:
            raise
        except Exception as error:
            raise self._judge.of_exception(attempt, error) from error

    async def _send(self, attempt: Attempt) -> httpx.Response:
        """Returns the response once its headers have arrived with status 200. The caller must release it."""
        await self._take_slot()
        response = None
        try:
            call = attempt.call
            content = call.for_upstream(attempt.target or self.target)
            request = post_request(self.upstream, call.path, content, call.headers)
            attempt.is_billable, attempt.sent_s = True, monotonic()
            response = await self.http.send(request, stream=True)
            if response.status_code == httpx.codes.OK:
                require_uncompressed(response)
                return response
            attempt.is_billable = response.status_code in _MAY_BILL
            content = b""
            with suppress(UnreadableAnswer):
                content = await content_of(response, _MAX_ERROR_BYTES)
            raise self._judge.of_status(attempt, response, content)
        except BaseException as error:
            attempt.is_billable = attempt.is_billable and has_connected(error)
            await self.release(response)
            raise

    async def release(self, response: httpx.Response | None) -> None:
        """Frees the concurrency slot and closes the response."""
        self._slots.release()
        if response is not None:
            with suppress(Exception):
                await response.aclose()

    async def _take_slot(self) -> None:
        try:
            async with asyncio.timeout(_SLOT_S):
                await self._slots.acquire()
        except TimeoutError:
            most = self.upstream.concurrency
            message = f"{self.target.name}: at its limit of {most} concurrent calls"
            raise UpstreamFailure("full", message, 429, _SLOT_S) from None
