"""Channels under upstream failures: exceptions, breaker reports and released slots."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from loopback import LoopbackServer
from prefill_router.policy.pool import Target
from prefill_router.policy.pool import Upstream as Way
from prefill_router.upstreams.transport import LONGEST_RETRY_AFTER_S, http_client
from prefill_serve.gateway import upstream as module
from prefill_serve.gateway import upstream_stream
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.call_record import Usage
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.responses_calls import ResponsesCall
from prefill_serve.gateway.upstream import Channel
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_failures import UpstreamFailure, UpstreamRefusal
from upstream import Fault, Upstream

SAID = [{"role": "user", "content": "how do you do"}]
PATIENT_S, HASTY_S = 10.0, 0.2
TIMEOUTS = (Fault.HANG, Fault.SLOW_HEAD, Fault.STALL, Fault.SLOW_CHUNKS)
CONTENT = b'data: {"model":"m","choices":[{"index":0,"delta":{"content":"three"}}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
ERROR = b'data: {"error":{"message":"it broke"}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = b'{"model":"m","choices":[]}'


def chat(stream: bool = False) -> ChatCall:
    return ChatCall({"messages": SAID, "stream": stream})


def responses(stream: bool = False) -> ResponsesCall:
    return ResponsesCall({"input": SAID, "stream": stream})


class Scripted(LoopbackServer):
    """A server that answers every request with the same status, headers and pieces."""

    def answers(self, *pieces: bytes, status: int = 200, headers: dict[str, str] | None = None) -> str:
        """A target's base URL."""
        self._answer = status, headers or {}, pieces
        return self.url

    async def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        status, headers, pieces = self._answer
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.02)  # otherwise two may arrive as one
        await response.write_eof()
        return response


class Watched(Breaker):
    """A breaker that stays closed and records what it is told."""

    is_open = False

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def succeed(self) -> None:
        self.heard.append("succeeded")

    def fail(self, caller: str, retry_after_s: float = 0.0) -> None:
        assert caller == "ann"
        self.heard.append(f"failed, {retry_after_s:g}")

    def doubt(self) -> None:
        self.heard.append("doubted")

    def pass_probe(self) -> None:
        self.heard.append("passed")

    def fail_probe(self, retry_after_s: float = 0.0) -> None:
        self.heard.append(f"probe failed, {retry_after_s:g}")


@pytest.fixture(scope="module")
def small() -> Iterator[Upstream]:
    with Upstream("small") as server:
        yield server


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        yield server


@asynccontextmanager
async def channel_to(url: str, **way: Any) -> AsyncIterator[tuple[Channel, Watched]]:
    async with http_client() as http:
        upstream = Way(**{"base_url": url, "timeout_s": PATIENT_S, "concurrency": 1, **way})
        breaker = Watched()
        channel = Channel(Target(name="t", input_price=1.0, output_price=1.0, upstream=upstream), http, breaker)
        yield channel, breaker


def attempt(call: Call) -> Attempt:
    return Attempt(call, "ann")


async def ask(channel: Channel, call: Call, pieces: list[bytes], made: Attempt | None = None) -> None:
    """Reads a stream to its end and appends what arrives to `pieces`."""
    if not call.is_stream:
        pieces.append(json.dumps(await channel.answer(made or attempt(call))).encode())
        return
    stream = await channel.stream(made or attempt(call))
    try:
        async for piece in stream.pieces():
            pieces.append(piece)
    finally:
        await stream.close()


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def answered(url: str, call: Call, **way: Any) -> bytes:
    """The bytes that a caller gets of a complete answer."""

    async def scenario() -> bytes:
        async with channel_to(url, **way) as (channel, breaker):
            pieces: list[bytes] = []
            await ask(channel, call, pieces)
            assert breaker.heard == ["succeeded"]
            assert channel.is_ready, "a place is not given back"
            return b"".join(pieces)

    return run(scenario)  # type: ignore[no-any-return]


def failed(url: str, call: Call, **way: Any) -> tuple[UpstreamFailure, list[str], bytes]:
    """The failure of a call, what the breaker was told, and what the caller had received."""

    async def scenario() -> tuple[UpstreamFailure, list[str], bytes]:
        async with channel_to(url, **way) as (channel, breaker):
            pieces: list[bytes] = []
            with pytest.raises(UpstreamFailure) as caught:
                await ask(channel, call, pieces)
            assert channel.is_ready, "a place is not given back"
            assert str(caught.value).startswith("t: ")
            return caught.value, breaker.heard, b"".join(pieces)

    return run(scenario)  # type: ignore[no-any-return]


# --- what others make up for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [chat, responses])
@pytest.mark.parametrize(
    ("fault", "stream", "reason", "status"),
    [
        *(
            (fault, stream, reason, status)
            for stream in (False, True)
            for fault, reason, status in [
                (Fault.UNAUTHORIZED, "status_401", 502),
                (Fault.NOT_FOUND, "status_404", 502),
                (Fault.RATE_LIMIT, "status_429", 429),
                (Fault.NO_QUOTA, "status_429", 429),
                (Fault.ERROR, "status_500", 502),
                (Fault.OVERLOADED, "status_503", 503),
                (Fault.HANG, "timeout", 504),
                (Fault.SLOW_HEAD, "timeout", 504),
                (Fault.RESET, "connection", 502),
                (Fault.NOT_JSON, "malformed", 502),
                (Fault.STALL, "timeout", 504),
                (Fault.SLOW_CHUNKS, "timeout", 504),
                (Fault.RESET_MIDWAY, "connection", 502),
            ]
        ),
        (Fault.EMPTY, False, "malformed", 502),
        (Fault.EMPTY, True, "cut", 502),
        (Fault.ERROR_FIRST, False, "error", 502),
        (Fault.ERROR_FIRST, True, "error_event", 502),
        (Fault.ERROR_MIDWAY, True, "error_event", 502),
        (Fault.CUT, False, "malformed", 502),
        (Fault.CUT, True, "cut", 502),
        (Fault.TRUNCATED, True, "cut", 502),
        (Fault.NOT_STREAMED, True, "cut", 502),
    ],
)
def test_a_fault_is_a_failure_with_its_reason(
    small: Upstream, kind: Any, fault: Fault, stream: bool, reason: str, status: int
) -> None:
    small.faults(fault)
    timeout_s = HASTY_S if fault in TIMEOUTS else PATIENT_S
    failure, heard, got = failed(small.url, kind(stream), timeout_s=timeout_s)
    assert small.completions[-1].fault is fault
    assert (failure.reason, failure.status) == (reason, status)
    assert not isinstance(failure, UpstreamRefusal)
    retry_after_s = 1.0 if fault in (Fault.RATE_LIMIT, Fault.OVERLOADED) else 0.0
    assert failure.retry_after_s == retry_after_s
    doubtful = fault in (Fault.UNAUTHORIZED, Fault.NOT_FOUND)
    assert heard == ["doubted" if doubtful else f"failed, {retry_after_s:g}"]
    is_midway = stream and fault in (Fault.ERROR_MIDWAY, Fault.CUT, Fault.TRUNCATED, Fault.RESET_MIDWAY, Fault.STALL)
    assert (b"small: " in got) == is_midway
    assert b"The server failed" not in got  # the gateway reports it to the caller


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "to_caller"),
    [
        (204, 502),
        (301, 502),
        (402, 502),
        (403, 502),
        (408, 502),
        (409, 502),
        (418, 502),
        (502, 502),
        (504, 504),
        (529, 502),
    ],
)
def test_any_other_status_is_a_failure(scripted: Scripted, status: int, to_caller: int, stream: bool) -> None:
    failure, heard, _ = failed(scripted.answers(status=status, headers={"location": "/"}), chat(stream))
    assert (failure.reason, failure.status) == (f"status_{status}", to_caller)
    assert heard == ["doubted" if status in (402, 403, 418) else "failed, 0"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "no such key"}}', "no such key"),
        (b'{"error": "no such key"}', "no such key"),
        (b'{"object": "error", "message": "no such key"}', "no such key"),
        (b'{"detail": [{"loc": ["key"], "msg": "no such key"}]}', "no such key"),
        (b'{"error": {"code": 7}}', None),
        (b'{"error": [7]}', None),
        (b"<html>Forbidden</html>", None),
        (b"[]", None),
        (b"", None),
    ],
)
def test_what_an_upstream_says_of_its_failure_is_for_the_log_alone(
    scripted: Scripted, body: bytes, said: str | None
) -> None:
    failure, _, _ = failed(scripted.answers(body, status=403), chat())
    assert (str(failure), failure.said) == ("t: answered 403", said)


@pytest.mark.parametrize(
    ("after", "retry_after_s"),
    [
        ("7", 7.0),
        ("soon", 0.0),
        ("-1", 0.0),
        ("Fri, 27 Nov 2020 12:00:00 GMT", 0.0),
        ("Fri, 27 Nov 2620 12:00:00 GMT", LONGEST_RETRY_AFTER_S),
    ],
)
def test_what_an_upstream_says_of_when_to_come_again_is_heard(
    scripted: Scripted, after: str, retry_after_s: float
) -> None:
    failure, heard, _ = failed(scripted.answers(status=429, headers={"retry-after": after}), chat())
    assert (failure.retry_after_s, heard) == (retry_after_s, [f"failed, {retry_after_s:g}"])


def test_nobody_listening_is_a_failure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        failure, heard, _ = failed(f"http://127.0.0.1:{taken.getsockname()[1]}", chat())
    assert (failure.reason, failure.status, heard) == ("connection", 502, ["failed, 0"])


# --- what is no answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[]", "malformed"),
        (b"null", "malformed"),
        (b'"three"', "malformed"),
        (b"{}", "malformed"),
        (b'{"choices": [}', "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"error": {"message": "it broke"}}', "error"),
        (b'{"error": "it broke", "choices": []}', "error"),
        (b'{"object": "error", "message": "it broke"}', "error"),
    ],
)
def test_a_200_without_an_answer_is_a_failure(scripted: Scripted, body: bytes, reason: str) -> None:
    failure, heard, _ = failed(scripted.answers(body), chat())
    assert (failure.reason, heard) == (reason, ["failed, 0"])


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_null(scripted: Scripted, number: str) -> None:
    """An answer that was paid for reaches its caller, in whatever language it parses JSON."""
    body = f'{{"choices":[{{"logprobs":{number}}}]}}'
    assert json.loads(answered(scripted.answers(body.encode()), chat())) == {"choices": [{"logprobs": None}]}


def test_an_error_that_is_null_is_none(scripted: Scripted) -> None:
    body = {"error": None, "choices": []}
    assert json.loads(answered(scripted.answers(json.dumps(body).encode()), chat())) == body


@pytest.mark.parametrize(
    ("pieces", "reason", "got"),
    [
        ([b": hello\n\n"], "cut", b""),
        ([b"data: [1]\n\n"], "malformed", b""),
        ([DONE], "cut", b""),
        ([WHOLE], "cut", b""),
        ([ERROR, DONE], "error_event", b""),
        ([b'data: {"object":"error","message":"it broke"}\n\n', DONE], "error_event", b""),
        ([CONTENT, b'event: error\ndata: {"message":"it broke"}\n\n', DONE], "error_event", CONTENT),
        ([CONTENT + ERROR + DONE], "error_event", CONTENT),
        ([CONTENT, CONTENT[:-2], b"\n\n" + ERROR], "error_event", 2 * CONTENT),
        ([CONTENT, DONE], "cut", CONTENT),
        ([CONTENT, DONE[:-2]], "cut", CONTENT),
        ([CONTENT, FINISH], "cut", CONTENT + FINISH),
        ([CONTENT, FINISH, DONE[:-3]], "cut", CONTENT + FINISH),
        ([CONTENT, FINISH[:-2]], "cut", CONTENT),
        ([CONTENT, ERROR[:-2]], "error_event", CONTENT),
        ([CONTENT, b"data: {\n\n"], "cut", CONTENT + b"data: {\n\n"),
    ],
)
def test_a_stream_that_does_not_end_as_it_should_is_a_failure(
    scripted: Scripted, pieces: Sequence[bytes], reason: str, got: bytes
) -> None:
    failure, heard, was_got = failed(scripted.answers(*pieces), chat(stream=True))
    assert (failure.reason, heard, was_got) == (reason, ["failed, 0"], got)


@pytest.mark.parametrize(
    "pieces",
    [
        [b": warming up\n\n", CONTENT, FINISH, DONE],
        [CONTENT + FINISH + DONE],
        [CONTENT[:20], CONTENT[20:] + FINISH + DONE[:3], DONE[3:]],
        [CONTENT, FINISH, DONE, b"whatever comes after"],
        [CONTENT, b"data: no such key: sk-1\n\n", b'data: "no such key: sk-1"\n\n', FINISH, DONE],
        [CONTENT, FINISH, DONE[:-1]],
        [CONTENT, FINISH, DONE[:-2]],
    ],
)
def test_a_stream_is_passed_on_however_it_is_cut(scripted: Scripted, pieces: Sequence[bytes]) -> None:
    assert answered(scripted.answers(*pieces), chat(stream=True)) == CONTENT + FINISH + DONE


@pytest.mark.parametrize("kind", ["completed", "incomplete"])
def test_the_last_event_of_a_response_needs_no_blank_line(scripted: Scripted, kind: str) -> None:
    last = b'event: response.%b\ndata: {"type":"response.%b","response":{}}' % (kind.encode(), kind.encode())
    assert answered(scripted.answers(CONTENT, last), responses(stream=True)) == CONTENT + last + b"\n\n"


def test_all_choices_that_began_must_end(scripted: Scripted) -> None:
    second = [event.replace(b'"index":0', b'"index":1') for event in (CONTENT, FINISH)]
    two = ChatCall({"messages": SAID, "stream": True, "n": 2})
    failure, _, got = failed(scripted.answers(CONTENT + second[0], FINISH, DONE), two)
    assert (failure.reason, got) == ("cut", CONTENT + second[0] + FINISH)
    whole = CONTENT + second[0] + FINISH + second[1] + DONE
    assert answered(scripted.answers(whole), two) == whole
    assert answered(scripted.answers(CONTENT + FINISH + DONE), two) == CONTENT + FINISH + DONE  # the whole stream


@pytest.mark.parametrize(("before", "got"), [(b"", b""), (CONTENT, CONTENT)])
def test_an_event_that_does_not_end_is_a_failure(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, before: bytes, got: bytes
) -> None:
    monkeypatch.setattr(upstream_stream, "MAX_EVENT_BYTES", 1000)
    url = scripted.answers(before + b'data: {"x":"', *[b"y" * 600] * 3)
    failure, heard, was_got = failed(url, chat(stream=True))
    assert (failure.reason, failure.status, heard, was_got) == ("too_large", 502, ["failed, 0"], got)
    assert "more than 1,000 bytes" in str(failure)


def test_comments_do_not_keep_a_call_waiting_for_ever(scripted: Scripted) -> None:
    url = scripted.answers(*[b": wait\n\n"] * 100)
    failure, _, _ = failed(url, chat(stream=True), timeout_s=HASTY_S)
    assert failure.reason == "timeout"


@pytest.mark.parametrize("piece", [b": wait\n\n", b'event: ping\ndata: {"type":"ping"}\n\n', b"x"])
def test_a_stream_that_has_begun_is_not_kept_open_by_less_than_an_event(scripted: Scripted, piece: bytes) -> None:
    failure, _, got = failed(scripted.answers(CONTENT, *[piece] * 100), chat(stream=True), timeout_s=HASTY_S)
    assert failure.reason == "timeout"
    assert got.startswith(CONTENT)


def test_a_stream_without_end_is_a_failure(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_stream, "MAX_STREAM_BYTES", 10 * len(CONTENT))
    failure, heard, got = failed(scripted.answers(*[CONTENT] * 20), chat(stream=True))
    assert (failure.reason, heard, got) == ("too_large", ["failed, 0"], CONTENT * 11)
    assert f"streamed more than {10 * len(CONTENT)} bytes" in str(failure)


@pytest.mark.parametrize("stream", [False, True])
def test_a_compressed_answer_is_a_failure(scripted: Scripted, stream: bool) -> None:
    url = scripted.answers(gzip.compress(bytes(1 << 24)), headers={"content-encoding": "gzip"})
    failure, heard, got = failed(url, chat(stream))
    assert (failure.reason, heard, got) == ("too_large", ["failed, 0"], b"")
    assert "compressed" in str(failure)


def test_an_answer_without_end_is_a_failure(scripted: Scripted) -> None:
    failure, heard, _ = failed(scripted.answers(*[b" " * (1 << 20)] * 20), chat())
    assert (failure.reason, heard) == ("too_large", ["failed, 0"])
    assert "more than 16,777,216 bytes" in str(failure)


def test_an_error_is_read_up_to_a_limit(scripted: Scripted) -> None:
    url = scripted.answers(b'{"error":{"message":"', *[b"x" * (1 << 16)] * 4, status=400)
    failure, _, _ = failed(url, chat())
    assert isinstance(failure, UpstreamRefusal)
    assert json.loads(failure.content)["error"]["message"] == "t: answered 400"


@pytest.mark.parametrize("stream", [False, True])
def test_the_type_of_an_answer_is_no_matter(small: Upstream, stream: bool) -> None:
    small.faults(Fault.WRONG_TYPE)
    assert b"small: " in answered(small.url, chat(stream))


def test_what_is_slow_but_in_time_is_an_answer(small: Upstream) -> None:
    small.slow_s = 0.05
    small.faults(Fault.SLOW_CHUNKS)
    try:
        assert answered(small.url, chat(stream=True)).endswith(DONE)
    finally:
        small.slow_s = 1.0


# --- the caller's own mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 405, 413, 415, 422])
def test_the_callers_own_mistake_is_passed_on_as_it_was_said(scripted: Scripted, status: int, stream: bool) -> None:
    said = {"message": "temperature: too hot", "type": "bad_value", "param": "temperature", "code": "too_hot"}
    url = scripted.answers(
        json.dumps({"error": {**said, "metadata": {"user": "ann"}}, "user": "ann"}).encode(), status=status
    )

    async def scenario() -> None:
        async with channel_to(url) as (channel, breaker):
            with pytest.raises(UpstreamRefusal) as caught:
                await ask(channel, chat(stream), [])
            assert caught.value.status == status
            assert json.loads(caught.value.content) == {"error": said}
            assert breaker.heard == []  # it does not show whether the upstream works
            assert channel.is_ready

    run(scenario)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": {"message": "max_tokens: too many for sk-live-1234567"}}', "max_tokens: too many for [redacted]"),
        (b'{"object": "error", "message": "max_tokens: too many"}', "max_tokens: too many"),
        (b'{"detail": [{"loc": ["body", "n"], "msg": "Field required"}]}', "Field required"),
        (b"<html>sk-live-1234567</html>", "t: answered 422"),
        (b'{"error": {"message": "no", "code": "sk-live-1234567", "param": "a b", "type": 7}}', "no"),
    ],
)
def test_of_a_refusal_nothing_is_passed_on_but_what_it_says(scripted: Scripted, content: bytes, message: str) -> None:
    url = scripted.answers(content, status=422)

    async def scenario() -> None:
        async with channel_to(url) as (channel, _):
            with pytest.raises(UpstreamRefusal) as caught:
                await ask(channel, chat(), [])
            kind = {"type": "invalid_request_error", "param": None, "code": "invalid_request"}
            assert json.loads(caught.value.content) == {"error": {"message": message, **kind}}

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_here_may_fit_elsewhere(small: Upstream, stream: bool) -> None:
    small.faults(Fault.BAD_REQUEST)
    failure, heard, _ = failed(small.url, chat(stream))
    assert (failure.reason, failure.status, heard) == ("too_long", 400, [])
    assert isinstance(failure, UpstreamRefusal)
    assert b"context_length_exceeded" in failure.content


def test_a_prompt_that_is_too_long_has_openais_code_whoever_refuses_it(scripted: Scripted) -> None:
    said = {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"}
    url = scripted.answers(json.dumps({"type": "error", "error": said}).encode(), status=400)
    failure, _, _ = failed(url, chat())
    assert isinstance(failure, UpstreamRefusal)
    assert json.loads(failure.content)["error"] == {**said, "param": None, "code": "context_length_exceeded"}


EARLY = {"error": {"message": "This model's maximum context length is 4096 tokens.", "code": 400}}
LATE = {"error": {"message": "Provider returned error", "code": 502}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_with_status_200_is_no_failure_of_the_upstream(scripted: Scripted, stream: bool) -> None:
    event = b"data: %b\n\n" if stream else b"%b"
    made = attempt(chat(stream))

    async def scenario(error: Any, *before: bytes) -> tuple[UpstreamFailure, list[str]]:
        async with channel_to(scripted.answers(*before, event % json.dumps(error).encode())) as (channel, breaker):
            with pytest.raises(UpstreamFailure) as caught:
                await ask(channel, made.call, [], made)
            return caught.value, breaker.heard

    refusal, heard = run(lambda: scenario(EARLY))
    assert isinstance(refusal, UpstreamRefusal)
    assert (refusal.reason, refusal.status, heard, made.is_billable) == ("too_long", 400, [], False)
    failure, heard = run(lambda: scenario(LATE))
    assert (isinstance(failure, UpstreamRefusal), heard, made.is_billable) == (False, ["failed, 0"], True)
    if stream:  # after some text it is a failure
        failure, heard = run(lambda: scenario(EARLY, CONTENT))
        assert (failure.reason, heard, made.is_billable) == ("error_event", ["failed, 0"], True)


def test_a_wrong_key_that_is_reported_as_a_bad_request_is_the_operators(scripted: Scripted) -> None:
    """Google's words; they reach the log, not the caller."""
    error = [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}]
    failure, heard, _ = failed(scripted.answers(json.dumps(error).encode(), status=400), chat())
    assert (failure.reason, failure.status, heard, failure.may_pass) == ("status_400", 502, ["doubted"], False)
    assert failure.said == "API key not valid. Please pass a valid API key."


# --- probes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "heard"),
    [
        (None, "passed"),
        (Fault.BAD_REQUEST, "passed"),  # it parsed the request
        (Fault.UNAUTHORIZED, "probe failed, 0"),
        (Fault.NOT_FOUND, "probe failed, 0"),
        (Fault.RATE_LIMIT, "probe failed, 1"),
        (Fault.ERROR, "probe failed, 0"),
        (Fault.HANG, "probe failed, 0"),
        (Fault.RESET, "probe failed, 0"),
        (Fault.EMPTY, "probe failed, 0"),
        (Fault.NOT_JSON, "probe failed, 0"),
        (Fault.ERROR_FIRST, "probe failed, 0"),
        (Fault.CUT, "probe failed, 0"),
    ],
)
def test_a_probe_tells_whether_the_upstream_answers(small: Upstream, fault: Fault | None, heard: str) -> None:
    small.faults(fault)

    async def scenario() -> None:
        way: dict[str, Any] = {"timeout_s": HASTY_S if fault in TIMEOUTS else PATIENT_S}
        async with channel_to(small.url, limit_field="max_completion_tokens", model="m", **way) as (channel, breaker):
            await channel.probe()
            assert breaker.heard == [heard]
            assert channel.is_ready

    run(scenario)
    asked = small.completions[-1].body
    assert (asked["model"], asked["max_completion_tokens"], len(str(asked)) < 200) == ("m", 1, True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "is_billable"),
    [
        (Fault.ERROR, False),
        (Fault.BAD_REQUEST, False),
        (Fault.RATE_LIMIT, False),
        (Fault.HANG, True),
        (Fault.RESET, True),
        (Fault.ERROR_FIRST, True),
        (Fault.CUT, True),
    ],
)
def test_an_upstream_may_bill_what_it_has_taken(small: Upstream, fault: Fault, stream: bool, is_billable: bool) -> None:
    small.faults(fault)
    made = attempt(chat(stream))

    async def scenario() -> None:
        async with channel_to(small.url, timeout_s=HASTY_S if fault in TIMEOUTS else PATIENT_S) as (channel, _):
            with pytest.raises((UpstreamFailure, UpstreamRefusal)):
                await ask(channel, made.call, [], made)

    run(scenario)
    assert made.is_billable == is_billable


@pytest.mark.parametrize(("status", "is_billable"), [(408, True), (504, True), (502, False), (404, False)])
def test_a_proxy_that_lost_patience_does_not_tell_what_is_billed(
    scripted: Scripted, status: int, is_billable: bool
) -> None:
    made = attempt(chat())

    async def scenario() -> None:
        async with channel_to(scripted.answers(status=status)) as (channel, _):
            with pytest.raises(UpstreamFailure):
                await channel.answer(made)

    run(scenario)
    assert made.is_billable == is_billable


def test_an_upstream_that_was_not_reached_bills_nothing() -> None:
    made = attempt(chat())

    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            async with channel_to(f"http://127.0.0.1:{taken.getsockname()[1]}") as (channel, _):
                with pytest.raises(UpstreamFailure):
                    await channel.answer(made)

    run(scenario)
    assert not made.is_billable


# --- places ------------------------------------------------------------------------------------------------------


def test_an_upstream_that_has_as_many_calls_as_it_may_is_full(small: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOT_S", 0.05)
    small.faults()

    async def scenario() -> None:
        async with channel_to(small.url, concurrency=2) as (channel, breaker):
            under_way = [await channel.stream(attempt(chat(stream=True))) for _ in range(2)]
            assert not channel.is_ready
            with pytest.raises(UpstreamFailure) as caught:
                await channel.answer(attempt(chat()))
            assert (caught.value.reason, caught.value.status) == ("full", 429)
            assert breaker.heard == []  # the upstream works
            for stream in under_way:
                await stream.close()
            assert channel.is_ready
            await channel.answer(attempt(chat()))

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_gives_back_the_place_and_is_no_failure(small: Upstream, stream: bool) -> None:
    small.faults(Fault.HANG)
    before = len(small.completions)

    async def scenario() -> None:
        async with channel_to(small.url) as (channel, breaker):
            leaving = asyncio.create_task(ask(channel, chat(stream), []))
            while len(small.completions) == before:
                await asyncio.sleep(0.01)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert channel.is_ready
            assert breaker.heard == []

    run(scenario)
    assert small.completions[-1].wait().client_left


@pytest.mark.parametrize("kind", [chat, responses])
def test_a_stream_tells_what_is_billed(small: Upstream, kind: Any) -> None:
    small.faults()

    async def scenario() -> tuple[Usage | None, bool]:
        async with channel_to(small.url) as (channel, _):
            stream = await channel.stream(attempt(kind(stream=True)))
            async for _piece in stream.pieces():
                pass
            await stream.close()
            return stream.usage, stream.is_whole

    usage, is_whole = run(scenario)
    billed = small.completions[-1].wait().billed
    assert billed is not None
    assert is_whole
    assert usage == Usage(billed.prompt_tokens, billed.completion_tokens, billed.cached_tokens)


@pytest.mark.parametrize(("pause_s", "is_measured"), [(0.0, True), (0.2, False)])
def test_a_stream_is_measured_unless_its_caller_takes_it_slowly(
    scripted: Scripted, pause_s: float, is_measured: bool
) -> None:
    url = scripted.answers(CONTENT, CONTENT, FINISH + DONE)

    async def scenario() -> None:
        async with channel_to(url) as (channel, _):
            stream = await channel.stream(attempt(chat(stream=True)))
            async for _ in stream.pieces():
                await asyncio.sleep(pause_s)
            await stream.close()
            measured = stream.measured
            assert (measured is not None) is is_measured
            assert measured is None or 0.0 < (measured.first_s or 0.0) < measured.whole_s

    run(scenario)
