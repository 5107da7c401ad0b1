"""Fuzzing: requests generated from the OpenAPI document, and damaged bodies."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from ray import serve

from gateway import Gateway
from mutations import damaged, mutated
from prefill_serve.settings import AppArgs, Settings
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
    """The API on a socket, for Schemathesis; no target can answer."""
    with Gateway(router=router) as gateway:
        yield gateway.url


def test_schemathesis_finds_no_violation(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            response = case.call()
            # A schema cannot express that any field is allowed except near misses of ours.
            if b"unknown field, did you mean" not in response.content:
                case.validate_response(response)

        check()
        num_operations += 1
    assert num_operations == 13


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
