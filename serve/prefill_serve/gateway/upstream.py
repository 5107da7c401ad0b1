"""The way to one target: its upstream is called, watched, and left alone when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import httpx

from prefill_router.pool import Target
from prefill_router.transport import is_callers_fault, post_request, retry_after_s
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.calls import Body, Call, json_object
from prefill_serve.gateway.events import MAX_EVENT_BYTES, EventSplitter, data_of
from prefill_serve.gateway.served import Usage

_END_S = 0.1
_PLACE_S = 1.0  # how long a call waits at an upstream that has as many as it may
_TOO_LONG = b"context_length_exceeded"


class Failed(Exception):  # noqa: N818 - others make up for it
    """An upstream gave no answer that can be used; `reason` is short, for labels."""

    def __init__(
        self,
        reason: str,
        message: str,
        status: int = 502,
        retry_after_s: float = 0.0,
        refusal: Refused | None = None,
    ) -> None:
        """`refusal` is what the upstream said, where the caller should hear it if no other target helps."""
        super().__init__(message)
        self.reason, self.status, self.retry_after_s, self.refusal = reason, status, retry_after_s, refusal


class Refused(Exception):  # noqa: N818 - an answer
    """What an upstream answers to a mistake of the caller's."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"status {status}")
        self.status, self.content = status, content


class Stream:
    """An answer that comes in pieces, of which the first has come and is no error. It must be closed."""

    def __init__(self, channel: Channel, call: Call, response: httpx.Response) -> None:
        self.usage: Usage | None = None
        self.answer_id: str | None = None
        self._channel, self._call, self._response = channel, call, response
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
            raise self._channel.failure("malformed", "streamed what is no JSON")

    async def pieces(self) -> AsyncIterator[bytes]:
        """What the caller gets, as it comes. Raises Failed where it breaks off, or says that the answer failed."""
        yield b"".join(self._first)
        while not self.is_whole:
            yield b"".join(await self._next_events())

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
            raise self._channel.failure_of(error) from error
        if piece is None:
            return self._last_events()
        events = list(self._for_caller(self._splitter.feed(piece)))
        if self._splitter.is_too_long and not self.is_whole and self._failure is None:
            most = self._splitter.max_bytes
            self._failure = self._channel.failure("too_large", f"streamed an event of more than {most:,} bytes")
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
            note = self._call.note(event)
            if note is not None:
                self.usage = note.usage or self.usage
                self.answer_id = note.answer_id or self.answer_id
                self._begun |= note.begun
                self._ended |= note.ended
                if note.error is not None:
                    self._failure = self._channel.failure("error_event", f"streamed an error: {note.error}")
                elif note.is_last and not self._call.is_whole(self._begun, self._ended):
                    self._failure = self._cut()
                if self._failure is not None:
                    self.is_whole = False
                    return
                self.is_whole = self.is_whole or note.is_last
            if note is None or note.is_for_caller:
                yield event

    def _cut(self) -> Failed:
        return self._channel.failure("cut", "ended its stream before the answer was whole")


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

    async def answer(self, call: Call) -> Body:
        """The whole answer to a call."""
        async with self._in_time():
            response = await self._send(call)
            try:
                body = json_object(await response.aread())
            finally:
                await self.release(response)
        if not body:
            raise self.failure("malformed", "answered with what is no JSON object")
        if (said := call.error(body)) is not None:
            raise self.failure("error", f"answered 200 with an error: {said}")
        self.breaker.succeed()
        return body

    async def stream(self, call: Call) -> Stream:
        """The answer to a call, once its first event has come."""
        async with self._in_time():
            stream = Stream(self, call, await self._send(call))
            try:
                await stream.begin()
            except BaseException:
                await stream.close()
                raise
            return stream

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Whatever goes wrong inside is a failure of the upstream, and so is what takes too long."""
        try:
            async with asyncio.timeout(self.upstream.timeout_s):
                yield
        except (Failed, Refused):
            raise
        except Exception as error:
            raise self.failure_of(error) from error

    async def _send(self, call: Call) -> httpx.Response:
        """The head of an answer with status 200; whoever gets it holds a place, and releases it."""
        await self._take_place()
        response = None
        try:
            self.breaker.begin()
            request = post_request(self.http, self.upstream, call.path, call.for_upstream(self.target))
            response = await self.http.send(request, stream=True)
            if response.status_code == httpx.codes.OK:
                return response
            raise self._status_failure(response, await response.aread())
        except BaseException:
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

    def failure(self, reason: str, message: str, status: int = 502, retry_after_s: float = 0.0) -> Failed:
        """A failure, which the breaker has counted."""
        self.breaker.fail(retry_after_s)
        return Failed(reason, f"{self.target.name}: {message}", status, retry_after_s)

    def failure_of(self, error: Exception) -> Failed:
        if isinstance(error, TimeoutError | httpx.ReadTimeout):  # not those of the transport, which calls more so
            return self.failure("timeout", f"did not answer within {self.upstream.timeout_s:g} s", 504)
        return self.failure("connection", "the connection failed")

    def _status_failure(self, response: httpx.Response, content: bytes) -> Failed | Refused:
        status = response.status_code
        if is_callers_fault(status):
            self.breaker.succeed()  # it works, and says what it does not take
            refused = Refused(status, content)
            if _TOO_LONG in content:  # but another may have a longer context
                return Failed("too_long", f"{self.target.name}: its context is too short", status, refusal=refused)
            return refused
        error = json_object(content).get("error")
        said = error.get("message") if isinstance(error, dict) else error
        return self.failure(
            f"status_{status}",
            f"answered {status}" + (f": {said}" if said else ""),
            status if status in (429, 503, 504) else 502,
            retry_after_s(response.headers.get("retry-after")) or 0.0,
        )
