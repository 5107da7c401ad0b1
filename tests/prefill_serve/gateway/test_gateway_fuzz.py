"""Fuzzing of both protocols: damaged calls, and damaged answers of upstreams. Errors have the protocol's shape."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from aiohttp import web

from gateway import Gateway, write_pool
from loopback import LoopbackServer
from mutations import damaged, mutated
from prefill_router.policy.pool import Target
from prefill_router.policy.pool import Upstream as Way
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.failure_judge import FailureJudge
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.translated_calls import translated
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_stream import UpstreamStream

CHAT, MESSAGES, RESPONSES, COUNT = (
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/messages/count_tokens",
)
PROTOCOLS = {"big": "anthropic", "small": "openai"}  # of the targets
JSON = {"content-type": "application/json"}
TOOL_ARGUMENTS = {"city": "Zürich 🎉", "days": 2}
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(TOOL_ARGUMENTS)}}
PIXEL = "iVBORw0KGgo="
CALLS: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "auto",
        "stream": False,
        "max_tokens": 100,
        "temperature": 0.5,
        "stop": ["x"],
        "tolerance": 0.1,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what is one"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}],
            },
        ],
    },
    MESSAGES: {
        "model": "auto",
        "stream": False,
        "max_tokens": 100,
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": "ann"},
        "messages": [
            {"role": "user", "content": "what is one"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "looking"},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": TOOL_ARGUMENTS},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
                ],
            },
        ],
    },
    RESPONSES: {
        "model": "auto",
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "what is one"}]},
            {"type": "function_call", "call_id": "t1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t1", "output": "sunny"},
        ],
    },
}
CALLS[COUNT] = {name: value for name, value in CALLS[MESSAGES].items() if name not in ("stream", "max_tokens")}

_USAGE = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 2}}
CHAT_ANSWER: dict[str, Any] = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "let me look", "tool_calls": [CALL]},
            "finish_reason": "tool_calls",
        }
    ],
    "usage": _USAGE,
}
MESSAGE_USAGE = {"input_tokens": 7, "cache_read_input_tokens": 2, "output_tokens": 5}
MESSAGE_ANSWER: dict[str, Any] = {
    "id": "m1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "let me look"},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": TOOL_ARGUMENTS},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": MESSAGE_USAGE,
}


def _chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"id": "c1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


CHAT_EVENTS: list[dict[str, Any]] = [
    _chunk({"role": "assistant", "content": ""}),
    _chunk({"content": "Zürich 🎉"}),
    _chunk({"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "weather", "arguments": ""}}]}),
    _chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "B'}}]}),
    _chunk({"tool_calls": [{"index": 0, "function": {"arguments": 'asel"}'}}]}),
    _chunk({}, "tool_calls"),
    {"id": "c1", "model": "m", "choices": [], "usage": _USAGE},
]
MESSAGE_EVENTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": {**MESSAGE_ANSWER, "content": [], "stop_reason": None}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Zürich 🎉"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "t1", "name": "weather"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"city":'}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '"Basel"}'}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
    {"type": "message_stop"},
]
ANSWERS = {"openai": CHAT_ANSWER, "anthropic": MESSAGE_ANSWER}


def sent(events: list[Any], protocol: str) -> list[bytes]:
    """The events as an upstream of the protocol sends them."""
    if protocol == "anthropic":
        return [
            b"event: %b\ndata: %b\n\n" % (str(_kind(event)).encode("ascii", "replace"), json.dumps(event).encode())
            for event in events
        ]
    return [*(b"data: %b\n\n" % json.dumps(event).encode() for event in events), b"data: [DONE]\n\n"]


def _kind(event: Any) -> Any:
    return event.get("type") if isinstance(event, dict) else None


EVENTS = {"openai": CHAT_EVENTS, "anthropic": MESSAGE_EVENTS}

# Bodies that few parsers agree on: nested as deep as Python can read or deeper, huge numbers, doubled keys, surrogates.
_SAID = '"messages": [{"role": "user", "content": "what is one"}], "max_tokens": 9, "input": "what is one"'
ODD_BODIES = [
    *(f'{{{_SAID}, "x": {"[" * depth}{"]" * depth}}}' for depth in (50, 500, *range(800, 1000, 8), 10_000)),
    *(f'{{{_SAID}, "tools": [{chr(123)}"a":{"[" * d}{"]" * d}{chr(125)}]}}' for d in range(800, 1000, 16)),
    *(f'{{{_SAID}, "temperature": {number}}}' for number in ("NaN", "-Infinity", "1e999", "9" * 400, "9" * 5000, "-0")),
    f'{{{_SAID}, "model": "small", "model": "big"}}',
    f'{{"messages": 3, {_SAID}, "stream": null, "stream": false}}',
    f'{{{_SAID}, "user": "\\ud800", "\\udfff": "\\udfff"}}',
    '{"messages": [{"role": "user", "content": "\\ud83d"}], "max_tokens": 9, "input": "\\ud83d"}',
    *('{"messages": ' + _SAID, "[" * 100_000, '{"a":' * 100_000, "", "null", "3", '"x"', "[]", "{}", "\ufeff{}"),
]


class Canned(LoopbackServer):
    """Answers every call with the same bytes, in as many pieces."""

    pieces: tuple[bytes, ...] = ()
    kind = "application/json"
    num_calls = 0

    async def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.num_calls += 1
        await request.read()
        response = web.StreamResponse(headers={"content-type": self.kind})
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
        return response


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Canned]]]:
    """A gateway with a target of each protocol."""
    folder = tmp_path_factory.mktemp("fuzz")
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Canned()) for name in PROTOCOLS}
        ways = {
            name: {"upstream": {"protocol": protocol, "responses": protocol == "openai", "timeout_s": 5.0}}
            for name, protocol in PROTOCOLS.items()
        }
        pool = write_pool(folder / "pool.toml", upstreams, **ways)  # type: ignore[arg-type]
        yield stack.enter_context(Gateway(router=router, pool=pool, cached_prompts=0)), upstreams


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Canned]], caplog: pytest.LogCaptureFixture) -> Iterator[Gateway]:
    """The gateway, whose log must have no traceback."""
    caplog.set_level(logging.WARNING)
    yield served[0]
    faults = [
        record
        for record in caplog.get_records("call")
        if record.name == "ray.serve" and (record.exc_info or record.levelno >= logging.ERROR)
    ]
    assert not faults, faults[0]


def answer_with(upstreams: dict[str, Canned], pieces: dict[str, tuple[bytes, ...]], kind: str) -> None:
    for name, protocol in PROTOCOLS.items():
        upstreams[name].pieces, upstreams[name].kind = pieces[protocol], kind


def require_error(path: str, body: Any) -> None:
    """Checks an error's shape."""
    if path.startswith(MESSAGES):
        assert set(body) == {"type", "error"}
        assert body["type"] == "error"
        assert {"type", "message"} <= set(body["error"])
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [150, pytest.param(800, marks=pytest.mark.slow("more of the same"))])
def test_damaged_calls_get_an_answer_or_an_error_of_their_protocol(
    gateway: Gateway, served: tuple[Gateway, dict[str, Canned]], number: int
) -> None:
    whole = {protocol: (json.dumps(answer).encode(),) for protocol, answer in ANSWERS.items()}
    answer_with(served[1], whole, "application/json")
    dice = random.Random(number)
    bodies = [(path, text.encode("utf-8", "surrogatepass")) for path in CALLS for text in ODD_BODIES]
    for _ in range(number):
        path = dice.choice(list(CALLS))
        body = json.dumps(mutated(CALLS[path], dice)).encode()
        bodies.append((path, damaged(body, dice) if dice.random() < 0.3 else body))
    for path, body in bodies:
        given = gateway.http.post(path, content=body, headers=JSON)
        is_unstreamed = given.status_code == 502 and b'"stream": true' in body  # the upstreams do not stream here
        assert given.status_code in (200, 400, 404, 409, 413) or is_unstreamed, (
            given.status_code,
            path,
            body[:300],
            given.text,
        )
        if given.status_code != 200:
            require_error(path, given.json())


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("number", [100, pytest.param(400, marks=pytest.mark.slow("more of the same"))])
def test_damaged_answers_are_answers_or_failures_of_their_upstream(
    gateway: Gateway, served: tuple[Gateway, dict[str, Canned]], path: str, number: int
) -> None:
    dice = random.Random(number)
    nested = [b'{"content": %b%b}' % (b"[" * depth, b"]" * depth) for depth in (*range(800, 1000, 8), 100_000)]
    for index in range(number + len(nested)):
        body = nested[index - number] if index >= number else b""
        pieces = {}
        for protocol, answer in ANSWERS.items():
            whole = json.dumps(mutated(answer, dice)).encode()
            pieces[protocol] = (body or (damaged(whole, dice) if dice.random() < 0.3 else whole),)
        answer_with(served[1], pieces, "application/json")
        for name in PROTOCOLS:
            given = gateway.post(path, {**CALLS[path], "model": name, "stop": None})
            assert given.status_code in (200, 502), (given.text, pieces[PROTOCOLS[name]])
            if given.status_code != 200:
                require_error(path, given.json())
            if not body:
                json.loads(given.content, parse_constant=pytest.fail)  # NaN


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("number", [100, pytest.param(400, marks=pytest.mark.slow("more of the same"))])
def test_damaged_streams_end_as_an_answer_or_with_an_error_of_the_protocol(
    gateway: Gateway, served: tuple[Gateway, dict[str, Canned]], path: str, number: int
) -> None:
    dice = random.Random(number)
    for _ in range(number):
        pieces = {protocol: _damaged_stream(protocol, dice) for protocol in EVENTS}
        answer_with(served[1], pieces, "text/event-stream")
        for name in PROTOCOLS:
            given = gateway.post(path, {**CALLS[path], "model": name, "stop": None, "stream": True})
            assert given.status_code in (200, 502), (given.text, pieces[PROTOCOLS[name]])
            if given.status_code == 200:
                require_end(path, given)
            else:
                require_error(path, given.json())


def _damaged_stream(protocol: str, dice: random.Random) -> tuple[bytes, ...]:
    events = list(EVENTS[protocol])
    for _ in range(dice.randrange(1, 3)):
        place = dice.randrange(len(events))
        match dice.randrange(4):
            case 0:
                del events[place]
            case 1:
                events.insert(place, dice.choice(events))
            case _:
                events[place] = mutated(events[place], dice)
    pieces = sent(events, protocol)
    if dice.random() < 0.4:
        place = dice.randrange(len(pieces))
        pieces[place] = damaged(pieces[place], dice)
    return tuple(pieces)


def require_end(path: str, given: httpx.Response) -> None:
    """Checks that the last event ends an answer or is an error."""
    last = [line for line in given.content.split(b"\n") if line.startswith(b"data:")][-1].removeprefix(b"data:").strip()
    ends = {CHAT: b"[DONE]", MESSAGES: b'{"type": "message_stop"}'}
    if last != ends[path] and b"message_stop" not in last:
        require_error(path, json.loads(last))


class _Answer:
    """The response of an upstream, in pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def aiter_raw(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
@pytest.mark.parametrize("call", [ChatCall({"messages": []}), MessagesCall({"messages": [], "max_tokens": 9})])
def test_a_stream_is_the_same_wherever_it_is_split(call: Call, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("answer_streams", "whole_answers"):
        monkeypatch.setattr(f"prefill_router.upstreams.translation.{module}.time", lambda: 1)
    whole = b"".join(sent(EVENTS[protocol], protocol))

    async def relayed(*pieces: bytes) -> tuple[bytes, Any]:
        target = Target(name="t", upstream=Way(base_url="http://127.0.0.1:9", protocol=protocol))  # type: ignore[arg-type]
        translation = translated(type(call)({**call.body, "messages": [{"role": "user", "content": "x"}]}), protocol)
        attempt, response = Attempt(translation.call, translation=translation), _Answer(list(pieces))
        stream = UpstreamStream(FailureJudge(target, Breaker()), attempt, response, AsyncMock())  # type: ignore[arg-type]
        await stream.begin()
        said = b"".join([piece async for piece in stream.pieces()])
        assert stream.is_whole
        return said, (stream.usage, stream.text_bytes)

    async def scenario() -> None:
        expected = await relayed(whole)
        assert expected == await relayed(*(whole[i : i + 1] for i in range(len(whole))))
        for place in range(1, len(whole)):
            assert await relayed(whole[:place], whole[place:]) == expected, place

    asyncio.run(scenario())
