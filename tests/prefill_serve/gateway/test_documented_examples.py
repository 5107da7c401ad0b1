"""The examples of the OpenAPI document, which /docs fills in, are answered when they are sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import gateway_of_two


def test_every_documented_body_is_answered_when_it_is_sent(router: str, tmp_path: Path) -> None:
    ledger = {"folder": str(tmp_path / "kept"), "keep_prompts": True}
    with gateway_of_two(router, tmp_path, gateway={"ledger": ledger}) as (gateway, _):
        document = gateway.http.get("/openapi.json").json()
        posts = {path: of["post"] for path, of in document["paths"].items() if "post" in of}
        for path in sorted(posts, key=lambda path: path == "/v1/feedback"):  # last, as it is on a request
            example = posts[path]["requestBody"]["content"]["application/json"]["example"]
            headers = {each["name"]: each["example"] for each in posts[path].get("parameters", [])}
            answer = gateway.http.post(path, json=example, headers=headers)
            assert answer.status_code == 200, (path, answer.text)
            for result in answer.json().get("results", []):
                assert result["status"] == 200
        described = [operation["description"] for of in document["paths"].values() for operation in of.values()]
        assert all(len(text) > 20 for text in described)


@pytest.mark.parametrize(("model", "whose"), [("auto", "no target here has"), ("small", 'model "small" lacks')])
def test_a_response_of_targets_without_that_api_is_told_which_path_to_use(
    router: str, tmp_path: Path, model: str, whose: str
) -> None:
    with gateway_of_two(router, tmp_path) as (gateway, upstreams):
        pool = tmp_path / "pool.toml"
        pool.write_text(pool.read_text().replace('"responses" = true', '"responses" = false'))
        gateway.configure(pool=str(pool))
        answer = gateway.post("/v1/responses", {"model": model, "input": "name a river"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "no_upstream")
        assert error["message"] == (
            f"{whose} the Responses API: call /v1/chat/completions, or set responses = true for an upstream that has it"
        )
        assert not [call for upstream in upstreams.values() for call in upstream.calls]
