"""A gateway on a real socket, in a thread of this process, with fake upstreams that fail on request."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import uvicorn

from prefill_serve.api import create_api
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.settings import Settings
from upstream import Upstream

PRICES = {"big": 2.0, "mid": 0.5, "small": 0.1}
_numbers = itertools.count(1)


def write_pool(path: Path, upstreams: Mapping[str, Upstream], **of_targets: Mapping[str, Any]) -> str:
    """Writes a pool file with one target per upstream; `of_targets` has further fields per target."""
    lines = []
    for name, upstream in upstreams.items():
        way = {"base_url": upstream.url, "model": f"{name}-1", "responses": True, "timeout_s": 2.0}
        more = {**of_targets.get(name, {})}
        way |= more.pop("upstream", {})
        fields = {"name": name, "input_price": PRICES[name], "output_price": 4 * PRICES[name], **more}
        lines += ["[[pool]]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
        lines += [f"upstream = {_toml(way)}"]
    path.write_text("\n".join(lines))
    return str(path)


def _toml(value: Any) -> str:
    """An inline value of TOML."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return f"{{ {', '.join(f'{json.dumps(key)} = {_toml(item)}' for key, item in value.items())} }}"


@contextmanager
def gateway_of_two(router: str, folder: Path, **settings: Any) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    """A gateway with two targets, "big" and "small", each with its own upstream."""
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}
        pool = write_pool(folder / "pool.toml", upstreams)
        yield stack.enter_context(Gateway(router=router, pool=pool, **settings)), upstreams


def renewed_pool(folder: Path, upstreams: Mapping[str, Upstream], timeout_s: float, **fields: Any) -> str:
    """Resets the upstreams' faults, and writes a new pool file, so that a gateway forgets their state."""
    for upstream in upstreams.values():
        upstream.faults()
        upstream.calls.clear()
    way = {"timeout_s": timeout_s, "concurrency": 100 + next(_numbers), **fields}
    return write_pool(folder / "pool.toml", upstreams, **{name: {"upstream": way} for name in upstreams})


class Gateway:
    """Context manager that serves with the endpoint's `settings`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings.model_validate({"open": True, "gateway": {}, **settings})
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio leaves out TCP_NODELAY: 40 ms per answer
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120.0)
        self.http = httpx.Client(base_url=self.url, timeout=120.0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="Gateway", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.should_exit = True
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.http.close()
        self._socket.close()

    async def _start(self) -> None:
        self.endpoint, self.ledger = Endpoint(), LocalLedger()
        await self._configure(self.settings)
        config = uvicorn.Config(create_api(self.endpoint, self.ledger), log_level="error")
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        await self._serving
        await self.endpoint.now.engine.close()
        await self.ledger.close()

    def configure(self, **settings: Any) -> None:
        """Changes the named settings."""
        self.settings = Settings.model_validate({**self.settings.model_dump(), **settings})
        self._run(self._configure(self.settings))

    async def _configure(self, settings: Settings) -> None:
        assert settings.gateway is not None
        await self.ledger.configure(settings.gateway.ledger)
        await self.endpoint.configure(settings)

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(300)

    # --- requests ------------------------------------------------------------------------------------------------

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, text: str, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def stats(self) -> Any:
        return self.http.get("/v1/stats").raise_for_status().json()

    def settle(self, num_calls: int) -> None:
        """Waits until so many calls have been recorded, which is after their answers were sent."""
        deadline = time.monotonic() + 60.0
        while self.stats()["calls"] < num_calls:
            assert time.monotonic() < deadline, f"fewer than {num_calls} calls were recorded"
