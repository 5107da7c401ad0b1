"""A streamed answer of an upstream: its events for the caller, what they report, and whether it is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from time import monotonic

import httpx

from prefill_router.common.usage import Usage
from prefill_router.policy.answer_times import MeasuredTimes
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_serve.gateway.events import MAX_EVENT_BYTES, EventSplitter, data_of, has_plain_words, is_keep_alive
from prefill_serve.gateway.failure_judge import FailureJudge
from prefill_serve.gateway.openai_calls import json_object
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_failures import UpstreamFailure, UpstreamRefusal

MAX_STREAM_BYTES = 256 << 20
_DRAIN_S = 0.1
_AWAY_SHARE, _AWAY_S = 0.2, 0.1  # of the time of an answer that its caller may take without spoiling the measure


class UpstreamStream:
    """A streamed answer whose first event has arrived and is not an error. Must be closed."""

    def __init__(
        self,
        judge: FailureJudge,
        attempt: Attempt,
        response: httpx.Response,
        release: Callable[[httpx.Response], Awaitable[None]],
    ) -> None:
        self.usage: Usage | None = None
        self.answer_id: str | None = None
        self.text_bytes = 0  # of the answer so far
        self._judge, self._attempt, self._call = judge, attempt, attempt.call
        self._response, self._release = response, release
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
            raise self._judge.failure(self._attempt, "malformed", "streamed invalid JSON")

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
            self._judge.breaker.succeed()
            # The connection can be reused once all data is read.
            with suppress(Exception):
                async with asyncio.timeout(_DRAIN_S):
                    await anext(self._pieces, None)
        await self._release(self._response)

    async def _next_events(self) -> list[bytes]:
        if self._failure is not None:
            raise self._failure
        started = monotonic()
        self._away_s += started - self._came_s
        try:
            async with asyncio.timeout(self._judge.upstream.timeout_s - self._waited_s):
                piece = await anext(self._pieces, None)
        except Exception as error:
            raise self._judge.of_exception(self._attempt, error) from error
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
        return self._judge.failure(self._attempt, "too_large", f"streamed {what}")

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
                    self._failure = self._refused(event) or self._judge.failure(
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
            self._failure, self.is_whole = self._judge.untranslatable(self._attempt, error), False
            return []

    def _refused(self, event: bytes) -> UpstreamRefusal | None:
        is_early = not self.text_bytes
        return self._judge.early_refusal(self._attempt, json_object(data_of(event))) if is_early else None

    def _cut(self) -> UpstreamFailure:
        return self._judge.failure(self._attempt, "cut", "ended its stream before the answer was complete")
