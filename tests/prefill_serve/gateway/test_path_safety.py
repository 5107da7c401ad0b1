"""What never passes the gateway: upstream keys, headers of a connection, addresses given by callers, slow readers."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway import Gateway, write_pool
from loopback import LoopbackServer
from prefill_serve.gateway import relay
from upstream import Fault, Upstream

CANARY = "sk-qx7zv-Ab3dEf6hIj9kLmNoPq"
ASKED = [{"role": "user", "content": "what is one plus two"}]
PATHS = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/messages": "messages"}
KINDS: list[dict[str, Any]] = [{"stream": True}, {}, {"model": "big"}, {"model": "small", "stream": True}]
SLOW = (Fault.HANG, Fault.SLOW_HEAD, Fault.STALL, Fault.SLOW_CHUNKS)  # they quote nothing
CONNECTION = {"connection": "keep-alive, x-secret, anthropic-beta", "x-secret": "1", "anthropic-beta": "b-1"}
HOP_BY_HOP = {"keep-alive": "timeout=5", "te": "trailers", "proxy-authorization": "Basic eDp5", "upgrade": "h2c"}
FROM_CALLER = {"cookie": "a=b", "x-forwarded-for": "9.9.9.9", "forwarded": "for=9.9.9.9", "authorization": "Bearer k"}


def post(gateway: Gateway, path: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {PATHS[path]: ASKED, "max_tokens": 50, **fields}
    return gateway.post(path, body, headers=headers or {})


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    """A gateway with a target of each protocol, whose upstreams have keys and quote them in their errors."""
    folder = tmp_path_factory.mktemp("safety")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        upstreams = {}
        for name in ("big", "small"):
            patch.setenv(f"{name.upper()}_KEY", f"{CANARY}{name}")
            upstreams[name] = stack.enter_context(Upstream(name, key=f"{CANARY}{name}", models=(f"{name}-1",)))
            upstreams[name].quotes = f" Your key {CANARY}{name} (ends in {CANARY[-5:]}{name}) was used."
        ways = {
            name: {"upstream": {"key_env": f"{name.upper()}_KEY", "timeout_s": 0.2, **more}}
            for name, more in (("big", {"protocol": "anthropic", "responses": False}), ("small", {}))
        }
        pool = write_pool(folder / "pool.toml", upstreams, **ways)
        ledger = {"folder": str(folder / "ledger"), "keep_prompts": True}
        yield stack.enter_context(Gateway(router=router, pool=pool, gateway={"ledger": ledger})), upstreams


def test_upstream_keys_are_in_nothing_that_the_gateway_emits(
    served: tuple[Gateway, dict[str, Upstream]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gateway, upstreams = served
    caplog.set_level(logging.DEBUG)
    emitted: list[str] = []
    for fault in Fault:
        for path in PATHS:
            for fields in KINDS[:1] if fault in SLOW else KINDS:
                for upstream in upstreams.values():
                    upstream.faults(fault, fault, fault)
                answer = post(gateway, path, **fields)
                emitted.append(f"{answer.headers} {answer.text}")
    leaky = [
        {"base_url": f"https://u:{CANARY}@x/v1"},
        {"base_url": "https://x/v1", "key_env": CANARY},
        {"base_url": "https://x/v1", "headers": {"authorization": f"Bearer {CANARY}"}},
    ]
    for way in leaky:
        pool = write_pool(tmp_path / "pool.toml", upstreams, big={"upstream": way})
        with pytest.raises(Exception, match="must") as refused:
            gateway.configure(pool=pool)
        emitted.append(str(refused.value))
    for page in ("/v1/stats", "/v1/status", "/v1/models", "/openapi.json"):
        emitted.append(gateway.http.get(page).text)
    emitted.append(gateway.post("/v1/route", {"messages": ASKED, "explain": True}).text)
    emitted += [f"{record.__dict__} {caplog.handler.format(record)}" for record in caplog.get_records("call")]
    folder = Path(gateway.settings.gateway.ledger.folder or "")  # type: ignore[union-attr]
    emitted += [file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file()]
    assert any("upstream failed" in text for text in emitted)
    assert any('"refused":"' in text for text in emitted)
    pieces = [CANARY[start : start + 6] for start in range(3, len(CANARY) - 5)]
    assert not [(piece, text) for text in emitted for piece in pieces if piece in text]


class Echo(LoopbackServer):
    """Records the headers of calls, and answers with headers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: list[dict[str, str]] = []

    async def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.Response:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        answer = {"id": "m", "type": "message", "content": [], "stop_reason": "end_turn", "choices": [{"message": {}}]}
        headers = {"x-upstream": "1", "set-cookie": "a=b", "www-authenticate": "Basic", "via": "1.1 x", "server": "s"}
        return web.json_response(answer, headers={**CONNECTION, **headers, "keep-alive": "timeout=5"})


@pytest.fixture(scope="module")
def echo(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Echo]]:
    folder = tmp_path_factory.mktemp("echo")
    with Echo() as upstream:
        protocols = {"big": {"upstream": {"protocol": "anthropic", "responses": False}}}
        pool = write_pool(folder / "pool.toml", {"big": upstream, "small": upstream}, **protocols)  # type: ignore[dict-item]
        with Gateway(router=router, pool=pool) as gateway:
            yield gateway, upstream


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_headers_of_a_connection_or_a_caller_are_not_relayed(echo: tuple[Gateway, Echo], path: str) -> None:
    gateway, upstream = echo
    upstream.headers.clear()
    for model in ("big", "small"):
        answer = post(gateway, path, {**CONNECTION, **HOP_BY_HOP, **FROM_CALLER}, model=model)
        assert answer.status_code == 200
        own = {"date", "server", "content-length", "content-type", "x-request-id", "request-id", "connection"}
        assert {name for name in answer.headers if not name.startswith("x-router-")} <= own
        assert answer.headers["server"] == "uvicorn"
    own = {"host", "accept", "connection", "user-agent", "content-type", "accept-encoding", "content-length"}
    for headers in upstream.headers:
        assert set(headers) <= {*own, "anthropic-version"}
        assert headers.get("connection", "keep-alive") == "keep-alive"  # which HTTP/1.1 implies


def test_a_header_for_upstreams_must_be_ascii(echo: tuple[Gateway, Echo]) -> None:
    """Otherwise it could not be sent, which would count as a failure of the upstream."""
    gateway, upstream = echo
    upstream.headers.clear()
    answer = gateway.http.post(
        "/v1/messages",
        content=json.dumps({"messages": ASKED, "max_tokens": 5, "model": "big"}),
        headers=[(b"content-type", b"application/json"), (b"anthropic-beta", "é".encode())],
    )
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "anthropic-beta: must be printable ASCII")
    assert not upstream.headers


class Trap(LoopbackServer):
    """A server that nobody should ask."""

    num_asked = 0

    async def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, _request: web.Request) -> web.Response:
        self.num_asked += 1
        return web.json_response({})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_no_caller_chooses_an_address(echo: tuple[Gateway, Echo], path: str) -> None:
    gateway, upstream = echo
    upstream.headers.clear()
    with Trap() as trap:
        host = trap.url.removeprefix("http://")
        names = ("base_url", "api_base", "url", "upstream", "endpoint", "proxy", "webhook")
        fields: list[dict[str, Any]] = [dict.fromkeys(names, trap.url), {"extra_body": {"base_url": trap.url}}]
        image = {"chat": {"type": "image_url", "image_url": {"url": f"{trap.url}/a.png"}}}
        image["messages"] = {"type": "image", "source": {"type": "url", "url": f"{trap.url}/a.png"}}
        part = image["messages" if path == "/v1/messages" else "chat"]
        fields.append({"messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]})
        headers = {
            "x-forwarded-host": host,
            "forwarded": f"host={host}",
            "x-original-url": trap.url,
            "referer": trap.url,
        }
        for more in fields:
            for model in ("big", "small"):
                assert post(gateway, path, headers, model=model, **more).status_code == 200
        for model in (trap.url, f"small@{host}", f"../../{host}", "http://small"):
            assert post(gateway, path, headers, model=model).status_code == 404
        absolute = gateway.http.build_request("POST", path, json={"messages": ASKED, "max_tokens": 5})
        absolute.extensions["target"] = f"{trap.url}{path}".encode()
        gateway.http.send(absolute)
        assert trap.num_asked == 0
    assert len(upstream.headers) >= 6


class Endless(LoopbackServer):
    """Streams an answer without end as fast as it is read, and counts its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self.ended = 0, threading.Event()

    async def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        chunk = {"choices": [{"index": 0, "delta": {"content": "x" * 60_000}}]}
        event = b"data: %b\n\n" % json.dumps(chunk).encode()
        try:
            while True:
                await response.write(event)
                self.num_bytes += len(event)
        finally:
            self.ended.set()


def test_a_slow_reader_holds_neither_memory_nor_an_upstream(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay, "_READER_S", 0.3)
    with Endless() as upstream:
        pool = write_pool(tmp_path / "pool.toml", {"big": upstream, "small": upstream})  # type: ignore[dict-item]
        with Gateway(router=router, pool=pool) as gateway, socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect(("127.0.0.1", gateway.port))
            body = json.dumps({"messages": ASKED, "model": "big", "stream": True}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            caller.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert caller.recv(1) == b"H"  # and no more
            assert upstream.ended.wait(30), "the upstream is still connected"
            assert upstream.num_bytes < 24 << 20  # what sockets buffer
            stats = gateway.stats()
    assert (stats["calls"], stats["cancelled"]) == (1, 1)
    assert sum(record.message == "caller reads too slowly" for record in caplog.records) == 1
