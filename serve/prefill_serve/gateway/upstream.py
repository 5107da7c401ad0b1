"""Sends calls to one target's upstream, limits concurrency, and feeds its circuit breaker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic

import httpx

from prefill_router.common.redaction import redacted
from prefill_router.common.usage import Usage
from prefill_router.policy.answer_times import MeasuredTimes
from prefill_router.policy.pool import Target
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_router.upstreams.transport import (
    UnreadableAnswer,
    content_of,
    has_connected,
    is_passing,
    post_request,
    require_uncompressed,
    retry_after_s,
)
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.events import MAX_EVENT_BYTES, EventSplitter, data_of, has_plain_words, is_keep_alive
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import Body, Call, json_object
from prefill_serve.gateway.refusals import refusal_reason
from prefill_serve.gateway.refused_fields import RefusedFields
from prefill_serve.gateway.translated_calls import TranslatedCall
from prefill_serve.gateway.upstream_errors import error_answer, error_message, refusal_body
from prefill_serve.gateway.upstream_failures import UpstreamFailure, UpstreamRefusal

MAX_STREAM_BYTES = 256 << 20
_MAX_ERROR_BYTES = 64 << 10  # of an error's body; a longer one is not read
_DRAIN_S = 0.1
_AWAY_SHARE, _AWAY_S = 0.2, 0.1  # of the time of an answer that its caller may take without spoiling the measure
_SLOT_S = 1.0  # how long a call waits at an upstream at its concurrency limit
_MAY_BILL = (408, 504)  # a proxy's timeout: the upstream behind it may still bill
_PROBE_S = 10.0
_PROBE = [{"role": "user", "content": "Hi"}]


@dataclass
class Attempt:
    """One try of a call at one upstream."""

    call: Call
    caller: str = ""
    is_billable: bool = False  # the upstream received it and did not reject it
    translation: TranslatedCall | None = None  # of which `call` is the upstream's side; None: the caller's own call
    target: Target | None = None  # without the fields that its model refuses [the channel's]
    usage: Usage | None = None  # of a whole answer, as the upstream reported it
    sent_s: float = 0.0  # by time.monotonic
    measured: MeasuredTimes | None = None  # once answered in one piece


class Stream:
    """A streamed answer whose first event has arrived and is not an error. Must be closed."""

    def __init__(self, channel: Channel, attempt: Attempt, response: httpx.Response) -> None:
        self.usage: Usage | None = None
        self.answer_id: str | None = None
        self.text_bytes = 0  # of the answer so far
        self._channel, self._attempt, self._call, self._response = channel, attempt, attempt.call, response
        self._splitter, self.is_whole = EventSplitter(MAX_EVENT_BYTES), False
        self._num_bytes, self._waited_s = 0, 0.0  # in all; for the next event
        self._first_s: float | None = None
        self._whole_s: float | None = None
        self._away_s, self._came_s = 0.0, monotonic()  # until the caller has taken what came; when that was
        translation = attempt.translation
        self._translate = translation.stream() if translation is not None and translation.stream else None
        self._begun_usage: Usage | None = None
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._pieces = response.aiter_raw()
        self._first: list[bytes] = []
        self._failure: UpstreamFailure | None = None

    async def begin(self) -> None:
        """Reads the first event. Raises UpstreamFailure if it is an error, missing or late."""
        while not self._first:
            self._first = [event for event in await self._next_events() if data_of(event)]
        if not data_of(self._first[0]).startswith(b"{"):
            self.is_whole = False
            raise self._channel.failure(self._attempt, "malformed", "streamed invalid JSON")

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the caller's events as they arrive. Raises UpstreamFailure if the stream is cut or fails."""
        yield b"".join(self._first)
        while not self.is_whole:
            yield b"".join(event for event in await self._next_events() if not has_plain_words(event))

    @property
    def measured(self) -> MeasuredTimes | None:
        """Times of a whole answer; None if it has no text, or if the caller took it slowly."""
        if self._first_s is None or self._whole_s is None or self._away_s > max(_AWAY_SHARE * self._whole_s, _AWAY_S):
            return None
        return MeasuredTimes(self._first_s, self._whole_s)

    async def close(self) -> None:
        if self.is_whole:
            self._channel.breaker.succeed()
            # The connection can be reused once all data is read.
            with suppress(Exception):
                async with asyncio.timeout(_DRAIN_S):
                    await anext(self._pieces, None)
        await self._channel.release(self._response)

    async def _next_events(self) -> list[bytes]:
        if self._failure is not None:
            raise self._failure
        started = monotonic()
        self._away_s += started - self._came_s
        try:
            async with asyncio.timeout(self._channel.upstream.timeout_s - self._waited_s):
                piece = await anext(self._pieces, None)
        except Exception as error:
            raise self._channel.failure_of(self._attempt, error) from error
        self._came_s = monotonic()
        if piece is None:
            return self._last_events()
        found = self._splitter.feed(piece)
        has_event = not all(map(is_keep_alive, found))
        self._waited_s = 0.0 if has_event else self._waited_s + self._came_s - started
        self._num_bytes += len(piece)
        events = list(self._for_caller(found))
        if not self.is_whole and self._failure is None:
            self._failure = self._too_large()
        return events

    def _too_large(self) -> UpstreamFailure | None:
        if self._splitter.is_too_long:
            what = f"an event of more than {self._splitter.max_bytes:,} bytes"
        elif self._num_bytes > MAX_STREAM_BYTES:
            what = f"more than {MAX_STREAM_BYTES:,} bytes"
        else:
            return None
        return self._channel.failure(self._attempt, "too_large", f"streamed {what}")

    def _last_events(self) -> list[bytes]:
        """Events at the end of the stream. Only a final event may lack the blank line; any other was cut off."""
        last = self._splitter.rest.rstrip(b"\r\n") + b"\n\n"
        note = self._call.note(last)
        if note is None or not (note.is_last or note.error):
            raise self._cut()
        return list(self._for_caller([last]))

    def _for_caller(self, events: list[bytes]) -> Iterator[bytes]:
        """Yields the events for the caller, up to an error."""
        for event in events:
            self.text_bytes += self._call.text_bytes(event)
            if self._first_s is None and self.text_bytes:
                self._first_s = self._came_s - self._attempt.sent_s
            note = self._call.note(event)
            if note is not None:
                self.answer_id = note.answer_id or self.answer_id
                self._begun |= note.begun
                self._ended |= note.ended
                self._begun_usage = note.begun_usage or self._begun_usage
                if self._call.is_whole(self._begun, self._ended) and note.usage:  # an earlier usage is partial
                    usage = Usage(*map(max, note.usage, self._begun_usage or note.usage))
                    self.usage = usage if usage.input_tokens else None  # of a message that began without one
                if note.error is not None:
                    self._failure = self._refused(event) or self._channel.failure(
                        self._attempt, "error_event", "streamed an error", said=note.error
                    )
                elif note.is_last and not self._call.is_whole(self._begun, self._ended):
                    self._failure = self._cut()
                if self._failure is not None:
                    self.is_whole = False
                    return
                if note.is_last and not self.is_whole:
                    self.is_whole, self._whole_s = True, self._came_s - self._attempt.sent_s
            if self._translate is not None:
                yield from self._translated(event)
            elif note is None or note.is_for_caller:
                yield event

    def _translated(self, event: bytes) -> list[bytes]:
        assert self._translate is not None
        data = data_of(event)
        if not data or has_plain_words(event):  # a comment, or what `pieces` leaves out
            return [event]
        try:
            return self._translate(data)
        except Untranslatable as error:
            self._failure, self.is_whole = self._channel.untranslatable(self._attempt, error), False
            return []

    def _refused(self, event: bytes) -> UpstreamRefusal | None:
        is_early = not self.text_bytes
        return self._channel.early_refusal(self._attempt, json_object(data_of(event))) if is_early else None

    def _cut(self) -> UpstreamFailure:
        return self._channel.failure(self._attempt, "cut", "ended its stream before the answer was complete")


class Channel:
    """One target's upstream, for one event loop. Calls raise UpstreamFailure."""

    def __init__(self, target: Target, http: httpx.AsyncClient) -> None:
        assert target.upstream is not None
        self.target, self.upstream, self.http = target, target.upstream, http
        self.breaker = Breaker()
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
            raise self.failure(attempt, "malformed", "answered with invalid JSON")
        if (said := attempt.call.error(body)) is not None:
            refusal = self.early_refusal(attempt, body)
            raise refusal or self.failure(attempt, "error", "answered 200 with an error", said=said)
        attempt.usage, translation = attempt.call.usage(body), attempt.translation
        if translation is not None and translation.answer is not None:
            try:
                body = translation.answer(body)
            except Untranslatable as error:
                raise self.untranslatable(attempt, error) from None
        self.breaker.succeed()
        attempt.measured = measured
        return body

    async def stream(self, attempt: Attempt) -> Stream:
        """Sends a call and returns the answer once its first event has arrived."""
        async with self._in_time(attempt):
            stream = Stream(self, attempt, await self._send(attempt))
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
        is_refused = self._refusal(response.status_code, error_answer(content)) is not None
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
            raise self.failure_of(attempt, error) from error

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
            raise self._status_failure(attempt, response, content)
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

    # --- failures ------------------------------------------------------------------------------------------------

    def failure(
        self,
        attempt: Attempt,
        reason: str,
        message: str,
        status: int = 502,
        retry_after_s: float = 0.0,
        said: str | None = None,
    ) -> UpstreamFailure:
        """Counts a failure in the breaker and returns it; `said` is the upstream's message."""
        self.breaker.fail(attempt.caller, retry_after_s)
        return self._failed(reason, message, status, retry_after_s, said)

    def untranslatable(self, attempt: Attempt, error: Untranslatable) -> UpstreamFailure:
        """The failure of an answer that cannot be expressed in the caller's protocol."""
        return self.failure(attempt, "malformed", "gave an answer that cannot be translated", said=str(error))

    def _failed(
        self, reason: str, message: str, status: int = 502, retry_after_s: float = 0.0, said: str | None = None
    ) -> UpstreamFailure:
        said = None if said is None else redacted(said, self.upstream.key)
        return UpstreamFailure(reason, f"{self.target.name}: {message}", status, retry_after_s, said=said)

    def failure_of(self, attempt: Attempt, error: Exception) -> UpstreamFailure:
        # The transport's connect and write timeouts are connection failures.
        if isinstance(error, TimeoutError | httpx.ReadTimeout):
            return self.failure(attempt, "timeout", f"did not answer within {self.upstream.timeout_s:g} s", 504)
        if isinstance(error, UnreadableAnswer):
            return self.failure(attempt, "too_large", str(error))
        return self.failure(attempt, "connection", "the connection failed")

    def _status_failure(self, attempt: Attempt, response: httpx.Response, content: bytes) -> UpstreamFailure:
        """Maps an error status; the breaker counts it unless the caller's request or the pool caused it."""
        status, answer = response.status_code, error_answer(content)
        if (refusal := self._refusal(status, answer)) is not None:
            return refusal
        reason, message, said = f"status_{status}", f"answered {status}", error_message(answer)
        if 400 <= status < 500 and not is_passing(status):  # a wrong key or model name, from the pool or the caller
            self.breaker.doubt()
            failure = self._failed(reason, message, said=said)
            failure.may_pass = False
            return failure
        after_s = retry_after_s(response.headers.get("retry-after")) or 0.0
        return self.failure(attempt, reason, message, status if status in (429, 503, 504) else 502, after_s, said)

    def _refusal(self, status: int, answer: Body) -> UpstreamRefusal | None:
        """The refusal of a request; None if the upstream failed, or refused a field that the target sets itself."""
        why = refusal_reason(status, answer)
        if why is None or (why.kind == "parameter" and why.name in self.upstream.extra_body):
            return None
        content = refusal_body(status, answer, self.target.name, self.upstream.key, is_too_long=why.kind == "too_long")
        return UpstreamRefusal(self.target.name, status, content, why)

    def early_refusal(self, attempt: Attempt, answer: Body) -> UpstreamRefusal | None:
        """The refusal in an error that was sent with status 200, as proxies do: its code is the status."""
        error = answer.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        refusal = self._refusal(code, answer) if isinstance(code, int) else None
        attempt.is_billable = attempt.is_billable and refusal is None
        return refusal
