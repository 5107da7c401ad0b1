"""Relays an upstream's stream to the caller."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from prefill_serve.gateway.active_call import ActiveCall
from prefill_serve.gateway.call_record import End
from prefill_serve.gateway.upstream_failures import UpstreamFailure
from prefill_serve.gateway.upstream_stream import UpstreamStream

log = logging.getLogger("ray.serve")

_READER_S = 60.0  # for each part of an answer, of which sockets buffer some; a slower caller is disconnected

_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')


class Relay(StreamingResponse):
    """Streams an answer's events with the target's name as model. A stream that fails ends with an error event."""

    def __init__(
        self,
        active: ActiveCall,
        stream: UpstreamStream,
        headers: dict[str, str],
        finish: Callable[[ActiveCall, UpstreamStream, End], None],
    ) -> None:
        self._active, self._stream, self._finish = active, stream, finish
        self._end: End = "cancelled"
        super().__init__(self._events(), 200, headers, "text/event-stream")

    def abandon(self) -> None:
        """Ends an answer whose caller disconnected before it started."""
        self._finish(self._active, self._stream, self._end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(_READER_S):
                    await send(message)
            except TimeoutError:
                raise _SlowReader from None

        try:
            await super().__call__(scope, receive, send_in_time)
        except _SlowReader:  # the server closes the connection of an incomplete answer
            log.warning("caller reads too slowly", extra={"route_id": self._active.caller.request_id})
        finally:  # even if the caller disconnects before the first event
            self._finish(self._active, self._stream, self._end)

    async def _events(self) -> AsyncIterator[bytes]:
        assert self._active.choice is not None
        rename = _Renaming(self._active.choice.target)
        try:
            async for piece in self._stream.pieces():
                if self._stream.is_whole:  # even if the caller disconnects right after the last event
                    self._end = "answered"
                yield rename(piece)
        except UpstreamFailure as failed:
            self._end = "failed"
            log.warning("upstream failed", extra=failed.for_log(self._active.caller.request_id))
            yield self._active.call.error_event(str(failed), "upstream_failed")


class _SlowReader(Exception):  # noqa: N818 - a caller's doing
    """A caller did not read a part of its answer in time."""


class _Renaming:
    """Replaces the upstream's model name with the target's name in the bytes of a stream."""

    def __init__(self, target: str) -> None:
        self._new = b'"model":' + json.dumps(target).encode()
        self._old: bytes | None = None

    def __call__(self, piece: bytes) -> bytes:
        if self._old is None:
            found = _MODEL.search(piece)
            if found is None:
                return piece
            self._old = found.group()
        # In a JSON string the quotes would be escaped, so this matches only the key.
        return piece.replace(self._old, self._new)
