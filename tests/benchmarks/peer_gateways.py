"""Starts LiteLLM's proxy and Switchyard's server before one upstream of the tests, for `gateway.py`, until Ctrl-C.

    make .venv/gateways
    python tests/benchmarks/peer_gateways.py

Prints the options for `gateway.py`. Both gateways have one model, `auto`, and otherwise their defaults, without keys.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from ending import ended
from peers.installed import program
from ports import free_port
from serving import wait_until
from upstream import Upstream

SWITCHYARD = """
schema_version = 1
[llm_clients.upstream]
format = "openai_chat"
base_url = "{url}"
api_key_env = "UPSTREAM_KEY"
[targets.model]
id = "model"
llm_client = "upstream"
[routes.auto]
id = "auto"
type = "passthrough"
target = "model"
"""
SERVE_SWITCHYARD = (
    "import sys, threading; from switchyard_rust.server import Server\n"
    "with Server(sys.argv[1], int(sys.argv[2])): threading.Event().wait()"
)
ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches the newest prices
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # on loopback, for this program alone
    "LITELLM_LOG": "ERROR",
    "UPSTREAM_KEY": "none",
}


def commands(url: str, folder: Path, ports: dict[str, int]) -> dict[str, list[str]]:
    """What starts each gateway, before the upstream at `url`."""
    of_litellm = {"model": "openai/model", "api_base": url, "api_key": "none"}
    litellm, switchyard = folder / "litellm.yaml", folder / "switchyard.toml"
    litellm.write_text(json.dumps({"model_list": [{"model_name": "auto", "litellm_params": of_litellm}]}))
    switchyard.write_text(SWITCHYARD.format(url=url))
    where = ["--host", "127.0.0.1", "--port", str(ports["litellm"])]
    return {
        "litellm": [program("litellm"), "--config", str(litellm), *where],
        "switchyard": [program("python"), "-c", SERVE_SWITCHYARD, str(switchyard), str(ports["switchyard"])],
    }


def answers(port: int) -> bool:
    body = {"model": "auto", "messages": [{"role": "user", "content": "one"}]}
    try:
        return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60).is_success
    except httpx.TransportError:
        return False


def main() -> None:
    ports = {"litellm": free_port(), "switchyard": free_port()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(Upstream("upstream", models=("model",)))
        for peer, command in commands(upstream.url, folder, ports).items():
            log = stack.enter_context((folder / f"{peer}.log").open("w"))
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            stack.callback(ended, process)
            wait_until(lambda peer=peer: answers(ports[peer]), f"{peer} answers: {(folder / peer)}.log")
        options = [f"--upstream {upstream.url}", *(f"--{peer} http://127.0.0.1:{port}" for peer, port in ports.items())]
        print(*options, flush=True)  # noqa: T201
        try:
            process.wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
