"""Malicious callers on a socket: against HAProxy with the endpoint's config, and against a replica directly."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import resource
import socket
from collections.abc import Iterator
from itertools import repeat
from time import monotonic

import httpx
import psutil
import pytest
from starlette.types import Message

from gateway import Gateway
from haproxies import Proxy, Recorder, haproxy_before
from prefill_serve.http_errors import Refusal
from prefill_serve.middleware.gate import _BodyReader
from serving import wait_until
from wire import ATTACKS, REFUSED, exchange, read_to_end, request, status_of

KEY = "pr-known"
AUTHORIZED = f"Authorization: Bearer {KEY}"
HEAD_S, QUIET_S = 1.0, 2.0  # far less than usual, and enough for a good caller on a busy machine
ROUTE = {"prompt": "what is one plus two"}


@pytest.fixture(scope="module")
def replica(router: str) -> Iterator[Gateway]:
    """The API with a key, on uvicorn as in a replica."""
    keys = {"ann": f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"}
    with Gateway(router=router, keys=keys, open=False, limits={"wait_s": 120.0}) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def proxy(replica: Gateway) -> Iterator[Proxy]:
    hasty = {"timeout http-request": f"{HEAD_S:.0f}s", "timeout client": f"{QUIET_S:.0f}s"}
    with haproxy_before([replica.port], hasty) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def recorded() -> Iterator[tuple[Proxy, Recorder]]:
    recorder = Recorder()
    with haproxy_before([recorder.port], {"timeout http-request": "300ms"}) as proxy:
        yield proxy, recorder
    recorder.close()


def route(port: int) -> httpx.Response:
    """A well-behaved caller."""
    url, headers = f"http://127.0.0.1:{port}/v1/route", {"authorization": f"Bearer {KEY}"}
    return httpx.post(url, json=ROUTE, headers=headers, timeout=120)


# --- one request that is read as two ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_reaches_a_replica_is_one_request_that_can_be_read_in_one_way(
    recorded: tuple[Proxy, Recorder], attack: str
) -> None:
    proxy, replica = recorded
    replica.got.clear()
    answer = exchange(proxy.port, ATTACKS[attack])
    got = b"".join(replica.got)
    head, _, body = got.partition(b"\r\n\r\n")
    framing = re.findall(rb"(?im)^(content-length|transfer-encoding):", head)
    assert len(framing) <= 1
    assert not re.search(rb"[\0\r](?!\n)|(?<!\r)\n|\n[ \t]", head)
    assert status_of(answer) == 200 or status_of(answer) in REFUSED
    if b"content-length" in head:
        assert len(body) == int(re.findall(rb"content-length: (\d+)", head)[0])
    else:
        assert body.count(b"0\r\n\r\n") == len(framing)
        assert not body or body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_passes_the_gate_or_is_the_replicas_trouble(proxy: Proxy, replica: Gateway, attack: str) -> None:
    """With and without HAProxy, as another proxy may replace it. The next caller is not affected."""
    assert status_of(exchange(proxy.port, ATTACKS[attack])) in REFUSED
    direct = exchange(replica.port, ATTACKS[attack])
    assert status_of(direct) in REFUSED
    assert direct.count(b"HTTP/1.1 ") <= 1
    answer = route(proxy.port)
    assert answer.status_code == 200, answer.text
    assert answer.json()["selected_model"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/stats",
        "//v1/stats",
        "/health/../v1/stats",
        "/docs/..%2fv1/stats",
        "/playground./../v1/stats",
        "/%76%31/stats",
        "/v1/stats?x=/health",
        "/v1/stats#/health",
        "/health;/v1/stats",
        "/-/healthz/../../v1/stats",
    ],
)
def test_no_path_leads_around_the_gate(proxy: Proxy, path: str) -> None:
    answer = exchange(proxy.port, request(f"GET {path}"))
    assert status_of(answer) in {400, 401, 404}
    assert b"usd" not in answer


def test_serves_own_paths_tell_nothing_but_that_it_is_up(proxy: Proxy) -> None:
    bodies = [
        exchange(proxy.port, request(f"GET /-/{name}")).partition(b"\r\n\r\n")[2] for name in ("healthz", "routes")
    ]
    assert bodies == [b"success", b'{"/":"app"}'] or bodies[0] == b"success"


# --- callers that take their time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "within_s"),
    [
        (b"", HEAD_S),
        (b"POST /v1/route HTTP/1.1\r\nHost: a\r\n", HEAD_S),
        (request("POST /v1/route", "Content-Length: 10", body=b"x"), HEAD_S),
        (request("POST /v1/route", "Transfer-Encoding: chunked", body=b"5\r\nab"), HEAD_S),
        (
            request("POST /v1/route", f"Authorization: Bearer {KEY}", "Content-Length: 200000", body=b"x" * 100_000),
            QUIET_S,
        ),
    ],
    ids=["nothing", "half a head", "half a body", "half a chunk", "half a long body"],
)
def test_who_stops_in_the_middle_is_left_in_time(proxy: Proxy, sent: bytes, within_s: float) -> None:
    started = monotonic()
    answer = exchange(proxy.port, sent)
    assert status_of(answer) in (408, 400)
    assert within_s - 0.1 < monotonic() - started < within_s + 10


def test_who_sends_a_byte_now_and_then_is_left_in_time(proxy: Proxy) -> None:
    """Although no single byte is late."""
    started = monotonic()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(b"GET /v1/stats HTTP/1.1\r\nX: ")
        client.settimeout(0.1)
        answer = b""
        while not answer and monotonic() - started < 60:
            try:
                answer = client.recv(1 << 16)
            except TimeoutError:
                client.sendall(b"a")
        answer += read_to_end(client)
    assert status_of(answer) == 408
    assert monotonic() - started < HEAD_S + 10


def test_a_late_body_is_an_error_as_all_others(proxy: Proxy) -> None:
    """Invalid HTTP gets HAProxy's own error page."""
    late = exchange(proxy.port, request("POST /v1/route", "Content-Length: 10", body=b"x"))
    assert json.loads(late.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_an_answer_may_take_longer_than_its_caller_may_be_silent() -> None:
    """As answers of upstreams do: only a side that has data to send or read must not be silent."""
    recorder = Recorder(waits_s=0.4)
    with haproxy_before([recorder.port], {"timeout client": "200ms"}) as proxy:
        assert status_of(exchange(proxy.port, request("GET /v1/stats"))) == 200
    recorder.close()


def test_a_body_must_be_whole_in_time_and_its_answer_may_take_longer() -> None:
    async def body(*pieces: bytes) -> bytes:
        """Body pieces without delay, then nothing until the caller disconnects."""
        messages: Iterator[Message] = iter(
            {"type": "http.request", "body": piece, "more_body": n < 2} for n, piece in enumerate(pieces)
        )

        async def receive() -> Message:
            return next(messages, None) or await asyncio.sleep(0.2, {"type": "http.disconnect"})

        receiving = _BodyReader(receive, None, 0.1)
        got = b""
        while (message := await receiving())["type"] == "http.request":
            got += message["body"]
        return got

    assert asyncio.run(body(b"a", b"b", b"c")) == b"abc"
    with pytest.raises(Refusal) as late:
        asyncio.run(body(b"a", b"b"))
    assert late.value.status_code == 408


# --- callers that are many -------------------------------------------------------------------------------------------

MOST_BYTES = 64 << 20  # growth of HAProxy with 4,096 connections without a request


@pytest.fixture
def idle() -> Iterator[list[socket.socket]]:
    """10,000 connections, or as many as this process may open. Most of them wait to be accepted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 12_000 if hard == resource.RLIM_INFINITY else min(hard, 12_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    clients = [socket.socket() for _ in range(most - 2000)]
    yield clients
    for client in clients:
        client.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def most_sessions(proxy: Proxy) -> int:
    """The most sessions that HAProxy has had at once."""
    rows = [line.split(",") for line in proxy.show("stat").splitlines()]
    return max(int(row[5]) for row in rows if row[1:2] == ["FRONTEND"])


@pytest.mark.slow("10,000 connections")
def test_who_says_nothing_keeps_nobody_else_out(replica: Gateway, idle: list[socket.socket]) -> None:
    """A head has 2 s here, so that the first callers are still there when the last ones arrive."""
    with haproxy_before([replica.port], {"timeout http-request": "2s"}) as proxy:
        assert route(proxy.port).status_code == 200
        process = psutil.Process(proxy.process.pid)
        before = process.memory_info().rss
        for client in idle:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", proxy.port))
        wait_until(lambda: most_sessions(proxy) > 4000, "a full house", 60)
        assert route(proxy.port).status_code == 200
        assert process.memory_info().rss - before < MOST_BYTES


@pytest.mark.slow("thousands of requests of a megabyte")
def test_large_heads_leave_nothing_behind(proxy: Proxy, replica: Gateway) -> None:
    haproxy, own = psutil.Process(proxy.process.pid), psutil.Process()
    large = ATTACKS["a header of 1 MiB"]

    def send(times: int) -> int:
        for _ in repeat(None, times):
            assert status_of(exchange(proxy.port, large)) in REFUSED
            assert status_of(exchange(replica.port, large)) in REFUSED
        return int(haproxy.memory_info().rss + own.memory_info().rss)

    before = send(50)
    assert send(500) - before < MOST_BYTES
