"""The plugin of `serve/examples` in LiteLLM's real proxy, before a router that answers, refuses and is silent."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ending import ended
from gateway import Gateway
from peers.installed import program
from ports import free_port
from serving import wait_until
from upstream import Upstream

PLUGIN = Path(__file__).parents[2] / "serve" / "examples" / "litellm_plugin.py"
NAMES = ("auto", "big", "small")
QUESTION = "what is one plus two"
TIMEOUT_S = 1.5


@dataclass
class Proxy:
    url: str
    key: str
    upstream: Upstream

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120.0)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120.0)

    def chat(self, text: str = QUESTION, **fields: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        body = {"model": "auto", "messages": messages, **fields}
        return self.http.post("/v1/chat/completions", json=body).raise_for_status()

    def asked(self) -> str:
        """The target of the last call."""
        return str(self.upstream.calls[-1].body["model"]).removesuffix("-1")


@pytest.fixture(scope="module")
def routing(router: str) -> Iterator[Gateway]:
    with Gateway(router=router) as gateway:
        gateway.post("/v1/route", {"prompt": QUESTION}).raise_for_status()
        yield gateway


@pytest.fixture(scope="module")
def proxy(routing: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder, port, key = tmp_path_factory.mktemp("litellm"), free_port(), f"sk-{secrets.token_hex(24)}"
    shutil.copy(PLUGIN, folder)
    with Upstream("upstream", models=[f"{name}-1" for name in NAMES]) as upstream:
        models = [
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{name}-1", "api_base": upstream.url, "api_key": "none"},
            }
            for name in NAMES
        ]
        config = {"model_list": models, "litellm_settings": {"callbacks": "litellm_plugin.router"}}
        (folder / "config.yaml").write_text(json.dumps(config))
        environment = os.environ | {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches the newest prices
            "LITELLM_MASTER_KEY": key,
            "PREFILL_ROUTER_TIMEOUT_S": str(TIMEOUT_S),
            "PREFILL_ROUTER_URL": routing.url,
        }
        environment.pop("PYTHONPATH", None)  # of the tests' environment
        command = [program("litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
        with (folder / "proxy.log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            proxy = Proxy(f"http://127.0.0.1:{port}", key, upstream)
            wait_until(lambda: _is_alive(proxy) or process.poll() is not None, "LiteLLM's proxy answers")
            assert process.poll() is None, (folder / "proxy.log").read_text()
            yield proxy
            proxy.http.close()
            proxy.client.close()
        finally:
            ended(process)


def _is_alive(proxy: Proxy) -> bool:
    try:
        return proxy.http.get("/health/liveliness").is_success
    except httpx.TransportError:
        return False


def test_the_target_of_a_chat_is_the_routers(proxy: Proxy, routing: Gateway) -> None:
    selected = routing.post("/v1/route", {"prompt": QUESTION}).json()["selected_model"]
    proxy.chat()
    assert proxy.asked() == selected
    for target in ("big", "small"):
        proxy.chat(models=[target], tolerance=0.5)
        assert proxy.asked() == target
        assert not proxy.upstream.calls[-1].body.keys() & {"models", "tolerance"}


def test_streams_responses_and_messages_are_routed_too(proxy: Proxy) -> None:
    wants = {"extra_body": {"models": ["small"]}}
    messages: Any = [{"role": "user", "content": QUESTION}]
    chunks = list(proxy.client.chat.completions.create(model="auto", messages=messages, stream=True, **wants))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).endswith(QUESTION)
    assert proxy.asked() == "small"
    proxy.client.responses.create(model="auto", input=QUESTION, **wants)
    assert proxy.asked() == "small"
    body = {"model": "auto", "max_tokens": 99, "system": "Be brief.", "messages": messages, "models": ["small"]}
    answer = proxy.http.post("/v1/messages", json=body).raise_for_status().json()
    assert answer["content"][0]["text"].endswith(QUESTION)
    assert proxy.asked() == "small"


def test_a_named_model_is_left_alone(proxy: Proxy, routing: Gateway) -> None:
    num_routed = len(routing.endpoint._readings)
    proxy.chat("a prompt that nobody routed", model="big")
    assert proxy.asked() == "big"
    assert len(routing.endpoint._readings) == num_routed


def test_feedback_is_given_by_the_proxys_id(proxy: Proxy, routing: Gateway) -> None:
    call_id = proxy.chat().headers["x-litellm-call-id"]
    routed = routing.post("/v1/route", {"prompt": QUESTION}, headers={"x-request-id": call_id}).json()
    assert routed["request_id"] == call_id  # the router takes the proxy's ids


def test_a_refused_call_goes_to_the_default_and_the_next_is_routed(proxy: Proxy) -> None:
    proxy.chat(models=["nobody"])
    assert proxy.asked() == "auto"
    proxy.chat(models=["small"])
    assert proxy.asked() == "small"


def test_a_silent_router_delays_one_call_by_its_limit_and_the_next_by_nothing(
    proxy: Proxy, routing: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def silent(*request: Any) -> Any:
        asked.append(request)
        await asyncio.sleep(3 * TIMEOUT_S)

    with monkeypatch.context() as patch:
        patch.setattr(routing.endpoint, "route", silent)
        delays_s = [proxy.chat(models=["small"]).elapsed.total_seconds() for _ in range(2)]
    assert proxy.asked() == "auto"
    assert len(asked) == 1
    assert delays_s[0] >= TIMEOUT_S
    wait_until(lambda: proxy.chat(models=["small"]) and proxy.asked() == "small", "routed again")
