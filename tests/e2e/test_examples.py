"""The examples of `serve/examples`, run as their readers run them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import Gateway, write_pool
from upstream import Upstream

EXAMPLES = Path(__file__).parents[2] / "serve" / "examples"
KEY = "sk-example"


@pytest.fixture(scope="module")
def server_url(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that wants a key, before a single upstream."""
    keys = {"ann": f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"}
    with Upstream("small", models=("small-1",)) as upstream:
        patient = {"upstream": {"timeout_s": 120.0}}
        pool = write_pool(tmp_path_factory.mktemp("examples") / "pool.toml", {"small": upstream}, small=patient)
        with Gateway(router=router, pool=pool, open=False, keys=keys) as gateway:
            yield f"{gateway.url}/v1"


def run(example: str, url: str) -> str:
    """What it prints."""
    environment = os.environ | {
        "PREFILL_ROUTER_URL": url,
        "PREFILL_ROUTER_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches the newest prices
        "LANGSMITH_TRACING": "false",
    }
    command = [sys.executable] if example.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*command, EXAMPLES / example], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_client(server_url: str) -> None:
    assert run("openai_client.py", server_url).splitlines() == [
        "small: What is 17 * 23?",
        "by small",
        "small: Count to three.",
        "by small",
        "calls get_weather {'city': 'small: How is it in Oslo? Use get_weather.'}",
        "small: 4 degrees and rain",
    ]


@pytest.mark.slow("litellm takes seconds to import")
def test_litellm_client(server_url: str) -> None:
    lines = ["small: What is 17 * 23?", "by small", "small: Count to three."]
    assert run("litellm_client.py", server_url).splitlines() == lines


@pytest.mark.slow("litellm takes seconds to import")
def test_litellm_plugin(server_url: str) -> None:
    """As the proxy calls it; `make test-gateways` runs it in the proxy."""
    printed = run("../../tests/peers/plugin_calls.py", server_url)
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"model": "small", "messages": [{"role": "user", "content": "What is 17 * 23?"}], "stream": True},
        {"model": "small", "input": "What is 17 * 23?"},
        {"model": "other", "messages": [], "tolerance": 0.1},
        {"model": "auto", "input": ["an embedding"]},
        {"model": "auto", "messages": [{"role": "user", "content": "no such target"}]},
        {"model": "auto", "input": "a refused connection"},
        {"model": "auto", "input": "not asked"},
    ]


@pytest.mark.slow("LangChain takes seconds to import")
def test_langchain_model(server_url: str) -> None:
    assert run("langchain_model.py", server_url).splitlines() == [
        "small: What is 17 * 23?",
        "by small",
        "small: Count to three.",
        "calls get_weather {'city': 'small: How is it in Oslo? Use get_weather.'}",
    ]


def test_curl(server_url: str) -> None:
    printed = run("curl.sh", server_url)
    assert printed.startswith("HTTP/1.1 200 OK")
    assert '"content": "small: What is 17 * 23?"' in printed
    assert '"model": "small"' in printed
    assert '"delta":{"content":"three."}' in printed
    assert printed.rstrip().endswith("data: [DONE]")
