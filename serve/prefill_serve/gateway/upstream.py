"""The way to one target: its upstream is called, watched, and left alone when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import httpx

from prefill_router.policy.pool import Target
from prefill_router.upstreams.redaction import redacted
from prefill_router.upstreams.transport import has_connected, is_callers_fault, is_passing, post_request, retry_after_s
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.call_record import Usage
from prefill_serve.gateway.events import MAX_EVENT_BYTES, EventSplitter, data_of, has_plain_words
from prefill_serve.gateway.openai_calls import Body, Call, ChatCall, json_object
from prefill_serve.gateway.upstream_errors import refusal_body, said_in

_END_S = 0.1
_PLACE_S = 1.0  # how long a call waits at an upstream that has as many as it may
_TOO_LONG = b"context_length_exceeded"
_MAY_BILL = (408, 504)  # a proxy that had no more patience says nothing of what is billed behind it
_PROBE_S = 10.0
_PROBE = [{"role": "user", "content": "Hi"}]


@dataclass
class Attempt:
    """One call at one upstream, for the caller whose key it came with."""

    call: Call
    holder: str = ""
    is_billable: bool = False  # the upstream has got it, and has not refused it


class Failed(Exception):  # noqa: N818 - others make up for it
    """An upstream gave no answer that can be used; `reason` is short, for labels."""

    def __init__(
        self,
        reason: str,
        message: str,
        status: int = 502,
        retry_after_s: float = 0.0,
        refusal: UpstreamRefusal | None = None,
        said: str | None = None,
    ) -> None:
        """`message` is for the caller, `said` are the upstream's words, redacted, for the log alone.

        `refusal` is what the caller gets instead if no other target helps.
        """
        super().__init__(message)
        self.reason, self.status, self.retry_after_s, self.refusal = reason, status, retry_after_s, refusal
        self.said = said

    def for_log(self, request_id: str) -> dict[str, str]:
        """Fields of a log line."""
        said = {} if self.said is None else {"said": self.said}
        return {"route_id": request_id, "reason": str(self), **said}


class UpstreamRefusal(Exception):  # noqa: N818 - an answer
    """What a caller gets whose own mistake an upstream has refused: the upstream's message, redacted."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"status {status}")
        self.status, self.content = status, content


class Stream:
    """An answer that comes in pieces, of which the first has come and is no error. It must be closed."""

    def __init__(self, channel: Channel, attempt: Attempt, response: httpx.Response) -> None:
        self.usage: Usage | None = None
        self.answer_id: str | None = None
        self.text_bytes = 0  # of the answer so far
        self._channel, self._attempt, self._call, self._response = channel, attempt, attempt.call, response
        self._splitter, self.is_whole = EventSplitter(MAX_EVENT_BYTES), False
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._pieces = response.aiter_raw()
        self._first: list[bytes] = []
        self._failure: Failed | None = None

    async def begin(self) -> None:
        """Raises Failed where the stream begins with an error, with nothing, or not in time."""
        while not self._first:
            self._first = [event for event in await self._next_events() if data_of(event)]
        if not data_of(self._first[0]).startswith(b"{"):
            self.is_whole = False
            raise self._channel.failure(self._attempt, "malformed", "streamed what is no JSON")

    async def pieces(self) -> AsyncIterator[bytes]:
        """What the caller gets, as it comes. Raises Failed where it breaks off, or says that the answer failed."""
        yield b"".join(self._first)
        while not self.is_whole:
            yield b"".join(event for event in await self._next_events() if not has_plain_words(event))

    async def close(self) -> None:
        if self.is_whole:
            self._channel.breaker.succeed()
            # The connection can serve again once all has been read.
            with suppress(Exception):
                async with asyncio.timeout(_END_S):
                    await anext(self._pieces, None)
        await self._channel.release(self._response)

    async def _next_events(self) -> list[bytes]:
        if self._failure is not None:
            raise self._failure
        try:
            async with asyncio.timeout(self._channel.upstream.timeout_s):
                piece = await anext(self._pieces, None)
        except Exception as error:
            raise self._channel.failure_of(self._attempt, error) from error
        if piece is None:
            return self._last_events()
        events = list(self._for_caller(self._splitter.feed(piece)))
        if self._splitter.is_too_long and not self.is_whole and self._failure is None:
            most = self._splitter.max_bytes
            self._failure = self._channel.failure(
                self._attempt, "too_large", f"streamed an event of more than {most:,} bytes"
            )
        return events

    def _last_events(self) -> list[bytes]:
        """Those at the end of a stream. Its last event may lack the blank line, any other was cut off there."""
        last = self._splitter.rest.rstrip(b"\r\n") + b"\n\n"
        note = self._call.note(last)
        if note is None or not (note.is_last or note.error):
            raise self._cut()
        return list(self._for_caller([last]))

    def _for_caller(self, events: list[bytes]) -> Iterator[bytes]:
        """Those that the caller gets; what comes before an error is not lost."""
        for event in events:
            self.text_bytes += self._call.text_bytes(event)
            note = self._call.note(event)
            if note is not None:
                self.answer_id = note.answer_id or self.answer_id
                self._begun |= note.begun
                self._ended |= note.ended
                if self._call.is_whole(self._begun, self._ended):  # before, a usage is of what there was so far
                    self.usage = note.usage or self.usage
                if note.error is not None:
                    self._failure = self._channel.failure(
                        self._attempt, "error_event", "streamed an error", said=note.error
                    )
                elif note.is_last and not self._call.is_whole(self._begun, self._ended):
                    self._failure = self._cut()
                if self._failure is not None:
                    self.is_whole = False
                    return
                self.is_whole = self.is_whole or note.is_last
            if note is None or note.is_for_caller:
                yield event

    def _cut(self) -> Failed:
        return self._channel.failure(self._attempt, "cut", "ended its stream before the answer was whole")


class Channel:
    """One target's upstream, for one event loop. Calls raise Failed or Refused."""

    def __init__(self, target: Target, http: httpx.AsyncClient) -> None:
        assert target.upstream is not None
        self.target, self.upstream, self.http = target, target.upstream, http
        self.breaker = Breaker()
        self._places = asyncio.Semaphore(self.upstream.concurrency)

    @property
    def is_ready(self) -> bool:
        """Would a call go out at once?"""
        return not self.breaker.is_open and not self._places.locked()

    async def answer(self, attempt: Attempt) -> Body:
        """The whole answer to a call."""
        async with self._in_time(attempt):
            response = await self._send(attempt)
            try:
                body = json_object(await response.aread())
            finally:
                await self.release(response)
        if not body:
            raise self.failure(attempt, "malformed", "answered with what is no JSON object")
        if (said := attempt.call.error(body)) is not None:
            raise self.failure(attempt, "error", "answered 200 with an error", said=said)
        self.breaker.succeed()
        return body

    async def stream(self, attempt: Attempt) -> Stream:
        """The answer to a call, once its first event has come."""
        async with self._in_time(attempt):
            stream = Stream(self, attempt, await self._send(attempt))
            try:
                await stream.begin()
            except BaseException:
                await stream.close()
                raise
            return stream

    async def probe(self) -> None:
        """Asks for one token, and tells the breaker whether the upstream answers."""
        call = ChatCall({"messages": _PROBE, self.upstream.limit_field: 1})
        request = post_request(self.http, self.upstream, call.path, call.for_upstream(self.target))
        try:
            async with asyncio.timeout(min(self.upstream.timeout_s, _PROBE_S)):
                response = await self.http.send(request)
        except Exception:
            self.breaker.fail_probe()
            return
        body = json_object(response.content)
        if is_callers_fault(response.status_code) or (response.is_success and body and call.error(body) is None):
            self.breaker.pass_probe()
        else:
            self.breaker.fail_probe(retry_after_s(response.headers.get("retry-after")) or 0.0)

    @asynccontextmanager
    async def _in_time(self, attempt: Attempt) -> AsyncIterator[None]:
        """Whatever goes wrong inside is a failure of the upstream, and so is what takes too long."""
        try:
            async with asyncio.timeout(self.upstream.timeout_s):
                yield
        except (Failed, UpstreamRefusal):
            raise
        except Exception as error:
            raise self.failure_of(attempt, error) from error

    async def _send(self, attempt: Attempt) -> httpx.Response:
        """The head of an answer with status 200; whoever gets it holds a place, and releases it."""
        await self._take_place()
        response = None
        try:
            call = attempt.call
            request = post_request(self.http, self.upstream, call.path, call.for_upstream(self.target))
            attempt.is_billable = True
            response = await self.http.send(request, stream=True)
            if response.status_code == httpx.codes.OK:
                return response
            attempt.is_billable = response.status_code in _MAY_BILL
            raise self._status_failure(attempt, response, await response.aread())
        except BaseException as error:
            attempt.is_billable = attempt.is_billable and has_connected(error)
            await self.release(response)
            raise

    async def release(self, response: httpx.Response | None) -> None:
        """Gives back a place, and what else an answer holds."""
        self._places.release()
        if response is not None:
            with suppress(Exception):
                await response.aclose()

    async def _take_place(self) -> None:
        try:
            async with asyncio.timeout(_PLACE_S):
                await self._places.acquire()
        except TimeoutError:
            most = self.upstream.concurrency
            raise Failed("full", f"{self.target.name}: has {most} calls, as many as it may", 429, _PLACE_S) from None

    # --- failures ------------------------------------------------------------------------------------------------

    def failure(
        self,
        attempt: Attempt,
        reason: str,
        message: str,
        status: int = 502,
        retry_after_s: float = 0.0,
        said: str | None = None,
    ) -> Failed:
        """A failure, which the breaker has counted; `said` are the upstream's words."""
        self.breaker.fail(attempt.holder, retry_after_s)
        return self._failed(reason, message, status, retry_after_s, said)

    def _failed(
        self, reason: str, message: str, status: int = 502, retry_after_s: float = 0.0, said: str | None = None
    ) -> Failed:
        said = None if said is None else redacted(said, self.upstream.key)
        return Failed(reason, f"{self.target.name}: {message}", status, retry_after_s, said=said)

    def failure_of(self, attempt: Attempt, error: Exception) -> Failed:
        if isinstance(error, TimeoutError | httpx.ReadTimeout):  # not those of the transport, which calls more so
            return self.failure(attempt, "timeout", f"did not answer within {self.upstream.timeout_s:g} s", 504)
        return self.failure(attempt, "connection", "the connection failed")

    def _status_failure(self, attempt: Attempt, response: httpx.Response, content: bytes) -> Failed | UpstreamRefusal:
        """The breaker counts what is no answer to a mistake of the caller's or of the pool's."""
        status = response.status_code
        if is_callers_fault(status):
            refused = UpstreamRefusal(
                status, refusal_body(status, json_object(content), self.target.name, self.upstream.key)
            )
            if _TOO_LONG in content:  # but another may have a longer context
                return Failed("too_long", f"{self.target.name}: its context is too short", status, refusal=refused)
            return refused
        reason, message, said = f"status_{status}", f"answered {status}", said_in(json_object(content))
        if 400 <= status < 500 and not is_passing(status):  # a key or a name, of the pool or of what the caller asked
            self.breaker.doubt()
            return self._failed(reason, message, said=said)
        after_s = retry_after_s(response.headers.get("retry-after")) or 0.0
        return self.failure(attempt, reason, message, status if status in (429, 503, 504) else 502, after_s, said)
