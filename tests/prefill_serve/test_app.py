"""The endpoint on a real Ray Serve, with a router around the tiny model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve

from prefill_router.config import load_toml
from prefill_router.router import Router
from prefill_serve.app import AppArgs, build_app


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def client(local_ray: None, router: str) -> Iterator[httpx.Client]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(AppArgs(router=router)), name="test", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    serve.shutdown()


def test_the_decision_is_the_routers_own(client: httpx.Client, router: str) -> None:
    answer = client.post("/v1/route", json={"prompt": "what is one plus two"}).raise_for_status().json()
    expected = Router.load(router).route("what is one plus two")
    assert answer["target"] == expected.target
    assert answer["p_correct"] == pytest.approx(expected.p_correct, abs=0.02)
    assert answer["router_version"] == expected.router_version
    assert answer["input_tokens"] == expected.input_tokens


def test_messages_and_constraints(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "name a river"}], "tolerance": 1.0}
    assert client.post("/v1/route", json=body).json()["target"] == "small"
    assert client.post("/v1/route", json={**body, "allowed": ["big"]}).json()["target"] == "big"
    assert client.post("/v1/route", json={**body, "tolerance": 0.0}).json()["target"] == "big"


def test_requests_at_once_are_answered_each_with_its_own(client: httpx.Client) -> None:
    prompts = [" ".join(["one"] * n) for n in range(1, 40)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: client.post("/v1/route", json={"prompt": p}).json(), prompts))
    lengths = [answer["input_tokens"] for answer in answers]
    assert lengths == [lengths[0] + n for n in range(len(prompts))]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give either prompt or messages"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "one", "allowed": ["nobody"]}, '"nobody" is not in the pool'),
        ({"prompt": "one", "max_cost_usd": 0}, "no target meets the constraints"),
        ({"prompt": "one", "temprature": 1}, "temprature"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ],
)
def test_bad_requests_get_400_and_say_why(client: httpx.Client, body: dict[str, object], message: str) -> None:
    response = client.post("/v1/route", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_body_that_is_no_json_gets_400(client: httpx.Client) -> None:
    response = client.post("/v1/route", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "error" in response.json()


def test_health(client: httpx.Client, router: str) -> None:
    health = client.get("/health").raise_for_status().json()
    assert health["status"] == "ok"
    assert health["router_version"] == Router.load(router).version
    assert health["targets"] == ["big", "small"]


def test_the_config_file_of_infra_fits_the_builder() -> None:
    path = Path(__file__).parents[2] / "infra" / "serve.yaml"
    config = yaml.safe_load(path.read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "prefill_serve.app:build_app"
    AppArgs.model_validate(application["args"])
    serve.schema.ServeDeploySchema.model_validate(config)
    assert config["http_options"]["host"] == "127.0.0.1"


def test_the_command_is_found_by_its_entry_point() -> None:
    scripts = load_toml(str(Path(__file__).parents[2] / "pyproject.toml"))["project"]
    assert scripts["entry-points"]["prefill_router.commands"]["serve"] == "prefill_serve.command:serve"
