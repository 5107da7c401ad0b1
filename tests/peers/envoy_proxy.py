"""The external processor of `serve/examples` with a real Envoy, its config, and two upstreams."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from ending import ended
from gateway import Gateway
from peers.installed import program
from ports import free_port
from serving import wait_until
from upstream import Upstream

EXAMPLES = Path(__file__).parents[2] / "serve" / "examples"
QUESTION = "what is one plus two"
TIMEOUT_S = 1.5


class Envoy:
    def __init__(self, port: int, upstreams: dict[str, Upstream]) -> None:
        self.http, self.upstreams = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0), upstreams

    def answers(self) -> bool:
        try:
            return self.chat(model="small").is_success
        except httpx.TransportError:
            return False

    def chat(self, content: Any = QUESTION, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"model": "auto", "messages": messages, **fields})

    def target(self, **fields: Any) -> str:
        """The upstream that answers, which is the one of its target."""
        answer = self.chat(**fields).raise_for_status().json()
        name = str(answer["choices"][0]["message"]["content"]).partition(":")[0]
        assert self.upstreams[name].calls[-1].body["model"] == name
        assert not self.upstreams[name].calls[-1].body.keys() & fields.keys() - {"model"}
        return name


@pytest.fixture(scope="module")
def routing(router: str) -> Iterator[Gateway]:
    with Gateway(router=router) as gateway:
        gateway.post("/v1/route", {"prompt": QUESTION}).raise_for_status()
        yield gateway


@pytest.fixture(scope="module")
def envoy(routing: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    folder, port, processor_port = tmp_path_factory.mktemp("envoy"), free_port(), free_port()
    environment = os.environ | {
        "PREFILL_ROUTER_PROCESSOR_PORT": str(processor_port),
        "PREFILL_ROUTER_TIMEOUT_S": str(TIMEOUT_S),
        "PREFILL_ROUTER_URL": routing.url,
    }
    environment.pop("PYTHONPATH", None)  # of the tests' environment
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(name,))) for name in ("big", "small")}
        config = (EXAMPLES / "envoy.yaml").read_text()
        ports = {10000: port, 9002: processor_port}
        ports |= {9101 + i: httpx.URL(upstream.url).port for i, upstream in enumerate(upstreams.values())}
        for written, used in ports.items():
            assert config.count(f"port_value: {written}") == 1
            config = config.replace(f"port_value: {written}", f"port_value: {used}")
        (folder / "envoy.yaml").write_text(config)
        log = stack.enter_context((folder / "log").open("w"))
        command = [program("envoy"), "--config-path", "envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id"]
        for arguments in ([program("python"), str(EXAMPLES / "envoy_processor.py")], command):
            process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=log)
            stack.callback(ended, process)
        envoy = Envoy(port, upstreams)
        wait_until(lambda: envoy.answers() or process.poll() is not None, "Envoy answers")
        assert process.poll() is None, (folder / "log").read_text()
        yield envoy
        envoy.http.close()


def test_each_call_reaches_the_upstream_of_its_target(envoy: Envoy, routing: Gateway) -> None:
    assert envoy.target() == routing.post("/v1/route", {"prompt": QUESTION}).json()["selected_model"]
    for target in ("big", "small"):
        assert envoy.target(models=[target]) == target
        assert envoy.target(model=target) == target


def test_a_large_image_passes_and_its_answer_is_streamed(envoy: Envoy) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 500_000}"}}
    content = [{"type": "text", "text": QUESTION}, image]
    answer = envoy.chat(content, stream=True, models=["small"]).raise_for_status()
    assert answer.text.rstrip().endswith("data: [DONE]")
    assert envoy.upstreams["small"].calls[-1].body["messages"][0]["content"] == content


def test_without_the_router_the_default_answers_in_time(
    envoy: Envoy, routing: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(*request: Any) -> Any:
        await asyncio.sleep(3 * TIMEOUT_S)

    with monkeypatch.context() as patch:
        patch.setattr(routing.endpoint, "route", silent)
        assert envoy.target(models=["small"]) == "big"
    assert envoy.target(models=["nobody"]) == "big"  # refused
    assert envoy.target(models=["small"]) == "small"


def test_what_is_no_json_goes_to_the_default_route_unchanged(envoy: Envoy) -> None:
    answer = envoy.http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert envoy.upstreams["big"].calls[-1].body == "{"
