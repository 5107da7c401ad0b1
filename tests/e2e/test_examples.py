"""The examples of `serve/examples`, run as their readers run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from upstream import Upstream

EXAMPLES = Path(__file__).parents[2] / "serve" / "examples"
KEY = "sk-example"


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """What the examples ask, with the key `KEY`."""
    with Upstream("small", key=KEY) as upstream:
        yield upstream.url


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
        [*command, EXAMPLES / example], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_client(server_url: str) -> None:
    assert run("openai_client.py", server_url).splitlines() == [
        "small: What is 17 * 23?",
        "by tiny",
        "small: Count to three.",
        "by tiny",
        "calls get_weather {'city': 'small: How is it in Oslo? Use get_weather.'}",
        "small: 4 degrees and rain",
    ]


def test_litellm_client(server_url: str) -> None:
    lines = ["small: What is 17 * 23?", "by tiny", "small: Count to three."]
    assert run("litellm_client.py", server_url).splitlines() == lines


def test_langchain_model(server_url: str) -> None:
    assert run("langchain_model.py", server_url).splitlines() == [
        "small: What is 17 * 23?",
        "by tiny",
        "small: Count to three.",
        "calls get_weather {'city': 'small: How is it in Oslo? Use get_weather.'}",
    ]


def test_curl(server_url: str) -> None:
    printed = run("curl.sh", server_url)
    assert printed.startswith("HTTP/1.1 200 OK")
    assert '"content":"small: What is 17 * 23?"' in printed
    assert '"model":"tiny"' in printed
    assert '"delta":{"content":"three."}' in printed
    assert printed.rstrip().endswith("data: [DONE]")
