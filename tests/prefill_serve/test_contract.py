"""Requests that nobody meant: made from the OpenAPI document, and bodies that were damaged."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
import yaml
from hypothesis import HealthCheck, given, settings
from ray import serve

from prefill_serve.api import create_api
from prefill_serve.app import AppArgs
from prefill_serve.endpoint import Endpoint
from prefill_serve.settings import Settings
from served import Api

MUTATIONS = 2_000
EXAMPLES = 50
SEED = {
    "messages": [
        {"role": "system", "content": "name a river"},
        {"role": "user", "content": [{"type": "text", "text": "what is one"}, {"type": "image_url", "image_url": {}}]},
    ],
    "tolerance": 0.1,
    "models": ["big", "small"],
    "max_cost_usd": 1.0,
    "explain": True,
}
ODD: list[Any] = [
    *(None, True, [], {}, "", " ", "\ud800", "\x00", "é" * 50, 0, -1, 1e308, 10**40, float("nan"), float("inf")),
    *([[]], {"a": 1}, ["big"] * 3, "big", "nobody", [{"role": "user"}], {"type": "text"}, "a" * 5000),
]


def mutated(value: Any, rng: random.Random) -> Any:
    """A value with one or two parts replaced, dropped, doubled or added."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    key, part = rng.choice(items)
    match rng.randrange(4):
        case 0:
            kept = [(k, v) for k, v in items if k != key]
        case 1:
            kept = [*items, (rng.choice(["prompt", "question", "model", "extra", "min_p_correct"]), rng.choice(ODD))]
        case _:
            kept = [(k, mutated(part, rng) if k == key else v) for k, v in items]
    return dict(kept) if isinstance(value, dict) else [v for _, v in kept]


def damaged(body: bytes, rng: random.Random) -> bytes:
    """Bytes that were cut, flipped or doubled."""
    place = rng.randrange(len(body))
    return rng.choice(
        [body[:place], body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :], body + body[place:]]
    )


def test_damaged_bodies_are_answered_in_the_documented_shape(api: Api) -> None:
    rng = random.Random(0)
    for number in range(MUTATIONS):
        body = json.dumps(mutated(SEED, rng)).encode()
        if number % 3 == 0:
            body = damaged(body, rng)
        path = "/v1/route/batch" if number % 10 == 0 else "/v1/route"
        if number % 20 == 0:
            body = b'{"requests": [' + body + b"]}"
        response = api.client.post(path, content=body, headers={"content-type": "application/json"})
        answer = response.json()
        if response.status_code == 200:
            assert "selected_model" in answer or "results" in answer, body
        else:
            assert 400 <= response.status_code < 500, (response.status_code, body)
            assert set(answer) == {"error"}
            assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.fixture
def url(router: str) -> Iterator[str]:
    """The API on a socket, for a tool that brings its own client."""
    port: Future[int] = Future()

    async def run() -> None:
        endpoint = Endpoint()
        await endpoint.configure(Settings(router=router, open=True))
        server = uvicorn.Server(uvicorn.Config(create_api(endpoint), port=0, log_level="error"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port.set_result(server.servers[0].sockets[0].getsockname()[1])
        await asyncio.to_thread(stop.wait)
        server.should_exit = True
        await serving

    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    yield f"http://127.0.0.1:{port.result(60)}"
    stop.set()
    thread.join()


def test_schemathesis_finds_no_violation(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate()

        check()
        num_operations += 1
    assert num_operations == 4


def test_the_config_file_of_infra_is_what_the_builder_and_replicas_take() -> None:
    path = Path(__file__).parents[2] / "infra" / "serve.yaml"
    config = yaml.safe_load(path.read_text())
    serve.schema.ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "prefill_serve.app:build_app"
    args = AppArgs.model_validate(application["args"])
    (deployment,) = application["deployments"]
    assert deployment["name"] == "Endpoint"
    assert Settings.model_validate(deployment["user_config"]) == args.settings
    assert config["http_options"]["host"] == "127.0.0.1"
