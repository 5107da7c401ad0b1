"""A fake server of OpenAI's and Anthropic's protocols for tests of clients: follows them, and fails on request.

with Upstream("small") as upstream:
    upstream.faults(Fault.RATE_LIMIT, Fault.RESET_MIDWAY)  # for the next two requests
    ...  # send requests to upstream.url
    assert upstream.completions[-1].billed == Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=4)
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from aiohttp import web

from loopback import LoopbackServer, Lost, arrived, reset
from messages_protocol import MessagesReply, messages_error, read_messages
from openai_protocol import (
    BadRequest,
    ChatReply,
    Event,
    Json,
    Prompt,
    Reply,
    ResponsesReply,
    Usage,
    answer,
    encode,
    error_body,
    read_chat,
    read_responses,
)


class Fault(StrEnum):
    """The faults of a request. A request selects one with `[[fault:429]]` in its last user message.

    `[[fault:429@small]]` applies to the upstream of that name only. Midway is after half of the answer's tokens.

    | fault        | streamed                                       | in one piece                                  |
    | ------------ | ---------------------------------------------- | --------------------------------------------- |
    | 400          | context_length_exceeded                        | the same                                      |
    | 401          | invalid_api_key                                | the same                                      |
    | 404          | model_not_found                                | the same                                      |
    | 429          | rate_limit_exceeded, with Retry-After          | the same                                      |
    | quota        | 429, insufficient_quota: not worth a retry     | the same                                      |
    | 500          | server_error                                   | the same                                      |
    | 503          | server_error, with Retry-After                 | the same                                      |
    | hang         | never answers                                  | the same                                      |
    | slow_head    | the header comes after `slow_s`, or on `hurry` | the same                                      |
    | reset        | the connection is reset before the header      | the same                                      |
    | empty        | 200 without a body                             | the same                                      |
    | wrong_type   | correct, but labelled text/html                | the same                                      |
    | not_json     | 200, the only event is plain text              | 200, a page of HTML labelled as JSON          |
    | error_first  | 200, the only event is an error                | 200, the body is an error                     |
    | error_midway | midway an error event, then the end            | 200, the body is an error                     |
    | cut          | ends midway without [DONE], closed normally    | 200, half of the body as if it were the whole |
    | truncated    | ends within an event, closed normally          | 200, half of the body as if it were the whole |
    | reset_midway | the connection is reset midway                 | it is reset after half of the body            |
    | stall        | silent from midway on, the connection stays    | half of the body, then silence                |
    | slow_chunks  | `slow_s` before each event                     | `slow_s` before the second half of the body   |
    | not_streamed | the answer comes in one piece, as JSON         | none                                          |

    A failure before the first token is not billed. A failure midway bills the prompt and the tokens sent.
    """

    BAD_REQUEST = "400"
    UNAUTHORIZED = "401"
    NOT_FOUND = "404"
    RATE_LIMIT = "429"
    NO_QUOTA = "quota"
    ERROR = "500"
    OVERLOADED = "503"
    HANG = "hang"
    SLOW_HEAD = "slow_head"
    RESET = "reset"
    EMPTY = "empty"
    WRONG_TYPE = "wrong_type"
    NOT_JSON = "not_json"
    ERROR_FIRST = "error_first"
    ERROR_MIDWAY = "error_midway"
    CUT = "cut"
    TRUNCATED = "truncated"
    RESET_MIDWAY = "reset_midway"
    STALL = "stall"
    SLOW_CHUNKS = "slow_chunks"
    NOT_STREAMED = "not_streamed"


_ERRORS = {  # status, type, code, param, message
    Fault.BAD_REQUEST: (400, "invalid_request_error", "context_length_exceeded", "messages", "The prompt is too long."),
    Fault.UNAUTHORIZED: (401, "invalid_request_error", "invalid_api_key", None, "The API key is not known."),
    Fault.NOT_FOUND: (404, "invalid_request_error", "model_not_found", None, "There is no such model."),
    Fault.RATE_LIMIT: (429, "requests", "rate_limit_exceeded", None, "Too many requests; wait a little."),
    Fault.NO_QUOTA: (429, "insufficient_quota", "insufficient_quota", None, "The quota is used up."),
    Fault.ERROR: (500, "server_error", None, None, "The server failed."),
    Fault.OVERLOADED: (503, "server_error", None, None, "The server is overloaded."),
}
_MESSAGES, _COUNT = "/v1/messages", "/v1/messages/count_tokens"
_READERS = {
    "/v1/chat/completions": read_chat,
    "/v1/responses": read_responses,
    _MESSAGES: read_messages,
    _COUNT: lambda body: read_messages({**body, "max_tokens": 1}),
}
_MARKER = re.compile(r"\[\[fault:(\w+)(?:@([^]]+))?]]")
_SECRET = ("authorization", "api-key", "x-api-key", "cookie")
_MIDWAY = (Fault.ERROR_MIDWAY, Fault.RESET_MIDWAY, Fault.CUT, Fault.TRUNCATED, Fault.STALL)


@dataclass
class Call:
    """A request that the upstream received, and its result. Call `wait()` before reading the fields of the result."""

    path: str
    headers: dict[str, str]  # in lower case, without secrets
    key_matched: bool | None  # None if the upstream requires no key
    body: Any  # the parsed JSON, or the text if it is not JSON
    came_s: float  # time.monotonic()

    fault: Fault | None = None
    status: int = 0  # 0 if no header was sent
    billed: Usage | None = None  # the whole prompt and the tokens sent
    client_left: bool = False  # client disconnected before the end
    took_s: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def wait(self, timeout_s: float = 10.0) -> Call:
        """Waits until the upstream has finished the request, possibly after its client has."""
        assert self._ended.wait(timeout_s), f"{self.path} has not ended within {timeout_s} s"
        return self


class Upstream(LoopbackServer):
    """Answers deterministically with its name and the last message, for any model."""

    def __init__(self, name: str = "upstream", key: str | None = None, models: Sequence[str] = ("tiny",)) -> None:
        """`models` are the listed models. The first one answers requests for others, and its name is in the answer."""
        super().__init__()
        self.name, self.key, self.models = name, key, tuple(models)
        self.first_byte_s = 0.0  # before any header; this and the next five may be set at any time
        self.between_chunks_s = 0.0
        self.slow_s = 1.0
        self.hurry = False  # ends the wait of `slow_head` early
        self.retry_after_s = 1
        self.quotes = ""  # appended to error messages
        self.calls: list[Call] = []
        self._queue: deque[Fault | None] = deque()
        self._at_random: tuple[float, Sequence[Fault], random.Random] = (0.0, (), random.Random())
        self._numbers = itertools.count(1)
        self._prefixes: set[int] = set()  # hashes of conversations seen, for the prompt cache

    def __enter__(self) -> Upstream:
        super().__enter__()
        self.url += "/v1"
        return self

    @property
    def completions(self) -> list[Call]:
        """The requests for answers; `calls` also has requests for the list of models."""
        return [call for call in self.calls if call.path != "/v1/models"]

    def faults(self, *faults: Fault | None, rate: float | None = None, seed: int = 0) -> None:
        """Sets the faults of the next requests for an answer, in order; None is no fault.

        With `rate`, all further requests get one of them with that probability. Replaces earlier settings.
        """
        self._queue.clear()
        if rate is None:
            self._queue.extend(faults)
            rate, faults = 0.0, ()
        self._at_random = rate, [fault for fault in faults if fault], random.Random(seed)

    async def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self._handle)
        app.router.add_post("/v1/chat/completions", self._handle)
        app.router.add_post("/v1/responses", self._handle)
        app.router.add_post(_MESSAGES, self._handle)
        app.router.add_post(_COUNT, self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = await self._record(request)
        try:
            response = await self._respond(request, call)
            if not response.prepared:
                call.status = response.status
                await response.prepare(request)
            await response.write_eof()
        except Lost:
            await arrived(request)
            reset(request)
            return web.Response()  # never reaches the client
        except (asyncio.CancelledError, ConnectionError):
            call.client_left = True
            raise
        finally:
            call.took_s = time.monotonic() - call.came_s
            call._ended.set()
        return response

    async def _record(self, request: web.Request) -> Call:
        came_s = time.monotonic()
        text = await request.text()
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        headers = {name.lower(): value for name, value in request.headers.items() if name.lower() not in _SECRET}
        given = f"Bearer {request.headers.get('x-api-key')}" if request.path == _MESSAGES else None
        matched = None if self.key is None else (given or request.headers.get("Authorization")) == f"Bearer {self.key}"
        call = Call(request.path, headers, matched, body, came_s)
        self.calls.append(call)
        return call

    async def _respond(self, request: web.Request, call: Call) -> web.StreamResponse:
        if call.key_matched is False:
            return self._error(Fault.UNAUTHORIZED)
        if call.path == "/v1/models":
            owned = {"object": "model", "created": 0, "owned_by": self.name}
            return _json({"object": "list", "data": [{"id": model, **owned} for model in self.models]})
        try:
            if not isinstance(call.body, dict):
                raise BadRequest("The body is not a JSON object.", None)
            prompt = _READERS[call.path](call.body)
        except BadRequest as error:
            return _json(messages_error(error.body) if call.path == _MESSAGES else error.body, 400)
        except (LookupError, TypeError, AttributeError) as error:
            return _json(error_body(f"Malformed: {error!r}", "invalid_request_error"), 400)
        call.fault = self._draw(prompt)
        await asyncio.sleep(self.first_byte_s)
        until = time.monotonic() + (self.slow_s if call.fault is Fault.SLOW_HEAD else 0)
        while time.monotonic() < until and not self.hurry:
            await asyncio.sleep(0.01)
        if call.fault in _ERRORS:
            return self._error(call.fault, call.path)
        if call.fault is Fault.HANG:
            await asyncio.Event().wait()
        if call.fault is Fault.RESET:
            raise Lost
        if call.fault is Fault.EMPTY:
            return web.Response(content_type="text/event-stream" if prompt.stream else "application/json")
        reply = self._reply(call, prompt)
        if call.path == _COUNT:
            return _json({"input_tokens": reply.usage.prompt_tokens})
        if prompt.stream and call.fault is not Fault.NOT_STREAMED:
            return await self._stream(request, call, reply)
        return await self._send_whole(request, call, reply)

    async def _stream(self, request: web.Request, call: Call, reply: Reply) -> web.StreamResponse:
        fault, events = call.fault, list(reply.events())
        with_tokens = [n for n, event in enumerate(events) if event.num_tokens]
        midway = with_tokens[(len(with_tokens) - 1) // 2] + 1
        kind = "text/html" if fault is Fault.WRONG_TYPE else "text/event-stream"
        response = web.StreamResponse(headers={"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"})
        await response.prepare(request)
        call.status = response.status
        if fault is Fault.NOT_JSON:
            await response.write(b"data: warming up\n\n")
            return response
        if fault is Fault.ERROR_FIRST:
            await response.write(reply.error(self._error_of(Fault.ERROR), 0).encode())
            return response
        call.billed = replace(reply.usage, completion_tokens=0)
        for n, event in enumerate(events):
            if n == midway and fault in _MIDWAY:
                await self._break_off(fault, response, event, reply.error(self._error_of(Fault.ERROR), n))
                return response
            await asyncio.sleep(self.slow_s if fault is Fault.SLOW_CHUNKS else self.between_chunks_s if n else 0)
            await response.write(event.encode())
            call.billed = replace(call.billed, completion_tokens=call.billed.completion_tokens + event.num_tokens)
        await response.write(reply.end)
        return response

    async def _break_off(self, fault: Fault, response: web.StreamResponse, next_event: Event, error: Event) -> None:
        if fault is Fault.RESET_MIDWAY:
            raise Lost
        if fault is Fault.STALL:
            await asyncio.Event().wait()
        if fault is Fault.ERROR_MIDWAY:
            await response.write(error.encode())
        if fault is Fault.TRUNCATED:
            await response.write(next_event.encode()[:-20])

    async def _send_whole(self, request: web.Request, call: Call, reply: Reply) -> web.StreamResponse:
        fault, body = call.fault, encode(reply.body())
        if fault in (Fault.ERROR_FIRST, Fault.ERROR_MIDWAY):
            error = self._error_of(Fault.ERROR)
            return _json(messages_error(error) if call.path == _MESSAGES else error)
        call.billed = reply.usage
        if fault is Fault.NOT_JSON:
            body = b"<html><body>warming up</body></html>"
        half = len(body) // 2
        if fault in (Fault.CUT, Fault.TRUNCATED):
            body = body[:half]
        kind = "text/html" if fault is Fault.WRONG_TYPE else "application/json"
        if fault not in (Fault.RESET_MIDWAY, Fault.STALL, Fault.SLOW_CHUNKS):
            return web.Response(body=body, content_type=kind)
        response = web.StreamResponse(headers={"Content-Type": kind, "Content-Length": str(len(body))})
        await response.prepare(request)
        call.status = response.status
        await response.write(body[:half])
        if fault is Fault.RESET_MIDWAY:
            raise Lost
        await (asyncio.sleep(self.slow_s) if fault is Fault.SLOW_CHUNKS else asyncio.Event().wait())
        await response.write(body[half:])
        return response

    def _reply(self, call: Call, prompt: Prompt) -> Reply:
        answers = [answer(self.name, prompt, index) for index in range(prompt.n)]
        usage = Usage(
            prompt_tokens=sum(len(text.split()) for _role, text in prompt.messages),
            cached_tokens=self._cached_tokens(prompt),
            completion_tokens=sum(answer.num_tokens for answer in answers),
        )
        model = prompt.model if prompt.model in self.models else self.models[0]
        make = {"/v1/responses": ResponsesReply, _MESSAGES: MessagesReply}.get(call.path, ChatReply)
        return make(f"{self.name}-{next(self._numbers)}", int(time.time()), model, prompt, call.body, answers, usage)

    def _draw(self, prompt: Prompt) -> Fault | None:
        for fault, name in _MARKER.findall(prompt.last_user_text):
            if name in ("", self.name):
                return Fault(fault)
        if self._queue:
            return self._queue.popleft()
        rate, faults, rng = self._at_random
        return rng.choice(faults) if faults and rng.random() < rate else None

    def _error(self, fault: Fault, path: str = "") -> web.Response:
        status, *_ = _ERRORS[fault]
        waits = fault in (Fault.RATE_LIMIT, Fault.OVERLOADED)
        error = self._error_of(fault)
        return _json(
            messages_error(error) if path == _MESSAGES else error,
            status,
            {"Retry-After": str(self.retry_after_s)} if waits else {},
        )

    def _error_of(self, fault: Fault) -> Json:
        _status, kind, code, param, message = _ERRORS[fault]
        return error_body(f"{message}{self.quotes}", kind, code, param)

    def _cached_tokens(self, prompt: Prompt) -> int:
        """The tokens of the prompt's longest prefix of messages that an earlier prompt had too."""
        key, tokens, cached = 0, 0, 0
        for role, text in prompt.messages:
            key = hash((key, role, text))
            tokens += len(text.split())
            if key in self._prefixes:
                cached = tokens
            self._prefixes.add(key)
        return cached


def _json(body: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=encode(body), status=status, headers=headers, content_type="application/json")
