"""The HTTP API as a caller sees it: requests, answers and errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from starlette.testclient import TestClient

from prefill_router.common.errors import UserError
from prefill_router.router.artifact import Router
from prefill_serve import serving
from prefill_serve.api import create_api
from prefill_serve.endpoint import Endpoint, Routing
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.scheduler import BatchScheduler, Overloaded
from prefill_serve.settings import Settings
from prefill_serve.wire import RouteRequest
from served import Api

QUESTION = "what is one plus two"
KEY = "pr-secret"
KEY_HASH = f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"


def test_the_answer_is_the_routers_own(api: Api, router: str) -> None:
    answer = api.post({"prompt": QUESTION}).raise_for_status().json()
    expected = Router.load(router).route(QUESTION)
    assert answer["selected_model"] == expected.target
    assert answer["model_names"] == list(expected.p_correct) == ["big", "small"]
    assert answer["confidences"] == pytest.approx(list(expected.p_correct.values()), abs=1e-3)
    assert answer["p_correct"] == pytest.approx(expected.p_correct, abs=1e-3)
    assert answer["costs"] == pytest.approx(list(expected.expected_cost_usd.values()), rel=1e-3)
    assert answer["expected_output_tokens"] == pytest.approx(expected.expected_output_tokens, rel=1e-3)
    assert answer["router_version"] == expected.router_version
    assert answer["metadata"]["input_tokens"] == expected.input_tokens
    assert answer["metadata"]["drift"]["distance"] > 0
    assert not answer["metadata"]["is_truncated"]


def test_what_is_served_is_what_was_computed_offline(api: Api, router: str) -> None:
    """Many at once, to involve batches, prefix cache and estimate cache."""
    prompts = [f"what is {a} plus {b}" for a in range(12) for b in range(12)]
    expected = Router.load(router).predict(prompts).p_correct
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: api.post({"prompt": p}).json(), prompts))
    np.testing.assert_allclose([answer["confidences"] for answer in answers], expected, atol=1e-3)


def test_prompt_question_and_messages_are_one(api: Api) -> None:
    answers = [
        api.post(body).json()
        for body in (
            {"prompt": QUESTION},
            {"question": QUESTION},
            {"messages": [{"role": "user", "content": QUESTION}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}], "name": "ann"}]},
            {"input": QUESTION},
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]},
        )
    ]
    assert len({str(answer["p_correct"]) for answer in answers}) == 1


def test_what_is_no_text_is_noted(api: Api) -> None:
    messages = [
        {"role": "developer", "content": "name a river"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is this"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]},
        {"role": "tool", "tool_call_id": "c", "content": "two"},
    ]
    answer = api.post({"messages": messages}).raise_for_status().json()
    assert answer["metadata"]["noted"] == {"image_url": 2, "tool_calls": 1}


OPENAI_FIELDS = (
    set(CompletionCreateParamsBase.__annotations__) | set(ResponseCreateParamsBase.__annotations__) | {"stream"}
)


def test_a_body_for_openai_is_taken_as_it_is_and_what_has_no_say_is_named(api: Api) -> None:
    alone = api.post({"prompt": QUESTION}).json()
    assert alone["metadata"]["ignored"] == []
    read = {"messages", "model", "input", "instructions", "prompt"}
    others = {name: None if len(name) % 2 else {"deep": [0.5]} for name in OPENAI_FIELDS - read}
    vendors = {"top_k": 5, "min_p": 0.1, "chat_template_kwargs": {}, "x_unknown": True}
    for asked in ({"messages": [{"role": "user", "content": QUESTION}]}, {"input": QUESTION}):
        answer = api.post({"model": "auto", **asked, **others, **vendors}).raise_for_status().json()
        assert answer["confidences"] == pytest.approx(alone["confidences"], abs=1e-3)
        assert answer["metadata"]["ignored"] == sorted(others | vendors)


def test_instructions_and_tools_of_a_response_are_read_as_the_gateway_reads_them(api: Api) -> None:
    said = [
        {"role": "user", "content": QUESTION},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "three"},
    ]
    as_messages = [
        {"role": "system", "content": "name a river"},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [said[1]]},
        {"role": "tool", "content": "three"},
    ]
    answer = api.post({"input": said, "instructions": "name a river"}).raise_for_status().json()
    assert answer["metadata"]["noted"] == {"tool_calls": 1}
    expected = api.post({"messages": as_messages}).json()
    assert answer["p_correct"] == expected["p_correct"]
    assert expected["metadata"]["is_cached"]  # same prompt
    ignored = api.post({"messages": as_messages, "instructions": "name a river"}).json()["metadata"]["ignored"]
    assert ignored == ["instructions"]


def test_policy_fields(api: Api) -> None:
    def target(**wants: Any) -> str:
        return str(api.post({"prompt": "name a river", **wants}).raise_for_status().json()["selected_model"])

    assert target(tolerance=1.0) == "small"
    assert target(tolerance=0.0) == "big"
    assert target(tolerance=1.0, models=["big"]) == "big"
    assert target(model="small", tolerance=0.0) == "small"
    assert target(model="auto", tolerance=0.0) == "big"
    cheap = api.post({"prompt": "name a river"}).json()["expected_cost_usd"]["small"]
    assert target(tolerance=0.0, max_cost_usd=cheap) == "small"


def test_an_explanation_names_the_reason_of_each_target(api: Api) -> None:
    body = {"prompt": "name a river", "tolerance": 0.0, "explain": True}
    explained = api.post(body).json()["explanation"]
    assert explained["big"].startswith("chosen")
    assert "more than the tolerance" in explained["small"]
    assert api.post({"prompt": "name a river"}).json()["explanation"] is None
    assert "not one of the allowed" in api.post({**body, "models": ["big"]}).json()["explanation"]["small"]


def test_reasons_are_for_programs_what_an_explanation_is_for_people(api: Api, router: str) -> None:
    def reasons(**fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        answer = api.post({"prompt": "name a river", "explain": True, **fields}).raise_for_status().json()
        assert list(answer["reasons"]) == list(answer["explanation"]) == answer["model_names"]
        return answer, answer["reasons"]

    assert "reasons" not in api.post({"prompt": "name a river"}).json()
    answer, told = reasons(tolerance=0.0)
    gap = answer["p_correct"]["big"] - answer["p_correct"]["small"]
    costs = answer["expected_cost_usd"]
    assert told["big"] == {"code": "chosen", "value": 0.0, "limit": 0.0}
    assert told["small"] == {"code": "tolerance", "value": pytest.approx(gap), "limit": 0.0}
    _, told = reasons(tolerance=1.0)
    assert told["small"] == {"code": "chosen", "value": pytest.approx(gap), "limit": 1.0}
    assert told["big"] == {"code": "not_cheapest", "value": costs["big"], "limit": costs["small"]}
    _, told = reasons(max_cost_usd=costs["small"])
    assert told["big"] == {"code": "max_cost_usd", "value": costs["big"], "limit": costs["small"]}
    best = answer["p_correct"]["big"]
    assert reasons(min_p_correct=best)[1]["small"] == {
        "code": "min_p_correct",
        "value": answer["p_correct"]["small"],
        "limit": best,
    }
    assert reasons(models=["big"])[1]["small"] == {"code": "not_allowed", "value": None, "limit": None}
    api.configure(router=router, explore=1.0)
    answer, told = reasons()
    assert told[answer["selected_model"]] == {"code": "explored", "value": pytest.approx(0.5), "limit": None}


BAD: list[tuple[Any, str]] = [
    ({}, "exactly one of prompt, question and messages"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "exactly one of"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ""}, "prompt: has no text, must have more than white space"),
    ({"prompt": " \n"}, "prompt: has no text, must have more than white space"),
    ({"prompt": "\ud800"}, "unicode"),
    ({"messages": []}, "messages: is empty, must have one item or more"),
    ({"messages": [{"role": "boss", "content": "hi"}]}, "role"),
    ({"messages": [{"role": "user", "content": None}]}, "white space"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "white space"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role: is missing"),
    ({"messages": [{"role": "user", "content": "hi"}] * 1025}, "at most 1,024"),
    ({"prompt": "one", "models": []}, "models"),
    ({"prompt": "one", "tolerence": 1}, 'tolerence: unknown field, did you mean "tolerance"?'),
    ({"prompt": "one", "max_cost": 1}, 'did you mean "max_cost_usd"?'),
    (
        {"prompt": "one", **{f"max_cost_us{n}": 1 for n in range(65)}},
        "65 fields that do not affect routing, must have at most 64",
    ),
    ({"prompt": "one", "\ud800": 1}, ""),
    ({"input": QUESTION, "prompt": QUESTION}, "exactly one of"),
    ({"input": []}, "input"),
    ({"input": [{"role": "boss", "content": "hi"}]}, "role"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "white space"),
    ({"prompt": "one", "tolerance": -1}, "tolerance"),
    ([], ""),
    (None, ""),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_requests_get_400_and_say_why(api: Api, body: Any, message: str) -> None:
    response = api.client.post("/v1/route", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]


@pytest.mark.parametrize(
    ("wants", "status", "code"),
    [
        ({"models": ["nobody"]}, 404, "model_not_found"),
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"max_cost_usd": 0}, 409, "no_target"),
        ({"min_p_correct": 1.0, "models": ["small"]}, 409, "no_target"),
    ],
)
def test_wants_that_cannot_be_met(api: Api, wants: dict[str, Any], status: int, code: str) -> None:
    response = api.post({"prompt": "name a river", **wants})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body: is missing"),
        (b"{", "the body is not valid JSON: Expecting property name enclosed in double quotes at character 2"),
        (b'{"prompt": "a",\n}', "the body is not valid JSON: "),
        (b"\xff\xfe", ""),
        (b"[" * 5000, ""),
        (b'{"prompt": "a", "tolerance": 1e999}', "tolerance: "),
        (b"9" * 5000, ""),
    ],
)
def test_a_body_that_is_no_json_gets_400_in_words(api: Api, content: bytes, message: str) -> None:
    response = api.client.post("/v1/route", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"]
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/route", 405), ("POST", "/v1/nothing", 404)])
def test_paths_and_methods_that_are_none(api: Api, method: str, path: str, status: int) -> None:
    response = api.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_request_id_is_kept_or_made(api: Api) -> None:
    answer = api.post({"prompt": QUESTION}, headers={"x-request-id": "my-id:1"})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "my-id:1"
    made = api.post({"prompt": QUESTION}, headers={"x-request-id": "bad id\x7f" * 40})
    assert made.json()["request_id"].startswith("route-")
    assert api.post({}).headers["x-request-id"]


def test_a_batch_answers_each_by_itself(api: Api) -> None:
    requests = [
        {"prompt": QUESTION},
        {"prompt": "one", "models": ["nobody"]},
        {"prompt": "name a river", "model": "big"},
    ]
    results = api.post({"requests": requests}, "/v1/route/batch").raise_for_status().json()["results"]
    assert [item["index"] for item in results] == [0, 1, 2]
    assert results[0]["response"]["p_correct"] == api.post({"prompt": QUESTION}).json()["p_correct"]
    assert results[1]["error"]["code"] == "model_not_found"
    assert results[2]["response"]["selected_model"] == "big"
    assert api.post({"requests": [{"prompt": "a"}] * 257}, "/v1/route/batch").status_code == 400
    assert api.post({"requests": []}, "/v1/route/batch").status_code == 400


def test_equal_prompts_are_read_once(api: Api) -> None:
    prompt = "one two three four five six seven of it all"
    first = api.post({"prompt": prompt}).json()
    second = api.post({"prompt": prompt, "tolerance": 1.0}).json()
    assert not first["metadata"]["is_cached"]
    assert second["metadata"]["is_cached"]
    assert second["p_correct"] == first["p_correct"]


def test_long_prompts_are_cut_and_said_or_refused(api: Api, router: str) -> None:
    answer = api.post({"prompt": "one " * 300}).raise_for_status().json()
    assert answer["metadata"]["is_truncated"]
    assert answer["metadata"]["input_tokens"] > 256
    api.configure(router=router, limits={"prompt_tokens": 50, "body_bytes": 2000})
    refused = api.post({"prompt": "two " * 60})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "prompt_too_long")
    refused = api.post({"prompt": "two " * 600})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


def test_a_body_without_a_length_is_bounded_too(api: Api, router: str) -> None:
    api.configure(router=router, limits={"body_bytes": 1000})
    chunks = (b'{"prompt": "', *(b"one " * 100 for _ in range(10)), b'"}')
    response = api.client.post("/v1/route", content=iter(chunks), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "path", ["/v1/route", "/v1/route/batch", "/v1/chat/completions", "/v1/responses", "/v1/feedback"]
)
def test_a_number_of_thousands_of_digits_is_the_callers_fault(api: Api, path: str) -> None:
    """Python does not convert numbers of more than 4,300 digits."""
    digits, json_type = "9" * 5000, {"content-type": "application/json"}
    stated = api.client.post(path, content=b"{}", headers={**json_type, "content-length": digits})
    assert (stated.status_code, stated.json()["error"]["code"]) == (413, "request_too_large")
    body = f'{{"prompt": "?", "tolerance": {digits}, "messages": [{{"role": "user", "content": {digits}}}]}}'
    assert 400 <= api.client.post(path, content=body, headers=json_type).status_code < 500
    padded = api.client.post(path, content=b"[]", headers={**json_type, "content-length": f"{'0' * 5000}2"})
    assert padded.status_code != 413


@pytest.mark.parametrize("path", ["/v1/route", "/v1/route/batch", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("how", ["disconnects", "is cancelled"])
def test_a_caller_who_hangs_up_is_no_fault_of_ours(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str, how: str
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(api.endpoint.metrics, "request", lambda _route, status, _seconds: counted.append(status))

    async def hang_up() -> None:
        asked, left = asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"pro', "more_body": True}]

        async def receive() -> dict[str, Any]:
            if len(messages) == 1 and how == "is cancelled":  # Ray Serve's way to report a disconnect
                asked.set()
                await left.wait()
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(_message: Any) -> None: ...

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        task = asyncio.create_task(api.client.app(scope, receive, send))  # type: ignore[call-arg,arg-type]
        if how == "is cancelled":
            await asked.wait()
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    assert api.client.portal is not None
    api.client.portal.call(hang_up)
    assert counted == [499]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xff"]
)
def test_without_a_valid_key_nothing_is_answered(api: Api, router: str, header: str | None) -> None:
    api.configure(router=router, open=False, keys={"ann": KEY_HASH})
    headers = {"authorization": header.encode("latin-1")} if header is not None else {}
    response = api.client.post("/v1/route", json={"prompt": QUESTION}, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert api.client.get("/nowhere").status_code == 401


def test_with_a_key_all_is_answered_and_probes_need_none(api: Api, router: str) -> None:
    api.configure(router=router, open=False, keys={"bob": "sha256:" + "0" * 64, "ann": KEY_HASH})
    headers = {"authorization": f"bearer {KEY}"}
    assert api.post({"prompt": QUESTION}, headers=headers).status_code == 200
    assert api.client.get("/health").status_code == api.client.get("/ready").status_code == 200


def test_a_key_may_come_as_anthropics_clients_send_it(api: Api, router: str) -> None:
    api.configure(router=router, open=False, keys={"ann": KEY_HASH})
    assert api.post({"prompt": QUESTION}, headers={"x-api-key": KEY}).status_code == 200
    refused = api.client.post("/v1/messages", json={}, headers={"x-api-key": f"{KEY}x"})
    assert refused.status_code == 401
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.json()["error"]["code"] == "invalid_api_key"


def test_settings_say_whether_the_endpoint_is_open(router: str) -> None:
    from pydantic import ValidationError

    from prefill_serve.settings import Settings

    for bad in ({}, {"open": True, "keys": {"ann": KEY_HASH}}, {"keys": {"ann": KEY}}):
        with pytest.raises(ValidationError):
            Settings.model_validate({"router": router, **bad})


# --- other settings ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(router: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A router on the same encoder that always prefers "small"."""
    loaded = Router.load(router)
    out = str(tmp_path_factory.mktemp("other") / "router")
    turned = loaded.with_pool(loaded.pool.model_copy(update={"targets": loaded.pool.targets[::-1]}))
    replace(loaded, trunk=turned.trunk, kernel=turned.kernel, calibration=turned.calibration).save(out)
    return out


def test_a_router_is_swapped_while_requests_run(api: Api, router: str, other: str) -> None:
    versions = {Router.load(uri).version for uri in (router, other)}
    stop, statuses, seen = threading.Event(), [], set()

    def ask() -> None:
        n = 0
        while not stop.is_set():
            response = api.post({"prompt": f"what is {n % 50} plus {n % 7}"})
            statuses.append(response.status_code)
            seen.add(response.json()["router_version"])
            n += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for uri in (other, router) * 5:
        api.configure(router=uri)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    assert seen == versions


def test_prices_and_tolerance_are_swapped_without_reading_prompts_anew(api: Api, router: str, tmp_path: Path) -> None:
    before = api.post({"prompt": QUESTION}).json()
    (tmp_path / "pool.toml").write_text(
        '[[p]]\nname = "big"\ninput_price = 1\noutput_price = 1\n'
        '[[p]]\nname = "small"\ninput_price = 5\noutput_price = 5\n'
    )
    api.configure(router=router, pool=str(tmp_path / "pool.toml"), tolerance=1.0)
    after = api.post({"prompt": QUESTION}).json()
    assert after["metadata"]["is_cached"]
    assert after["p_correct"] == before["p_correct"]
    assert after["router_version"] == before["router_version"]
    assert after["selected_model"] == "big"
    assert after["expected_cost_usd"]["small"] == pytest.approx(5 * after["expected_cost_usd"]["big"], rel=0.5)


def test_bad_settings_are_refused_and_the_old_ones_stay(api: Api, router: str, tmp_path: Path) -> None:
    shutil.copytree(router, tmp_path / "bad")
    (weights,) = (tmp_path / "bad").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for settings, reason in [
        ({"router": str(tmp_path / "bad")}, "damaged"),
        ({"router": str(tmp_path / "nowhere")}, "no router found"),
        ({"router": router, "safe": {"target": "nobody"}}, "nobody"),
        ({"router": router, "canary": {"router": str(tmp_path / "bad"), "share": 0.5}}, "damaged"),
    ]:
        with pytest.raises(UserError, match=reason):
            api.configure(**settings)
        status = api.client.get("/v1/status").raise_for_status().json()
        assert reason in status["refused"]
        assert status["router_version"] == Router.load(router).version
        assert api.post({"prompt": QUESTION}).status_code == 200
    api.configure(router=router)
    assert api.client.get("/v1/status").json()["refused"] is None


def test_a_canary_answers_its_share_and_a_prompt_always_goes_the_same_way(api: Api, router: str, other: str) -> None:
    api.configure(router=router, canary={"router": other, "share": 0.3})
    prompts = [f"what is {a} plus {b}" for a in range(20) for b in range(10)]
    first = [api.post({"prompt": prompt}).json() for prompt in prompts]
    canaries = [answer["metadata"]["is_canary"] for answer in first]
    assert 0.2 < np.mean(canaries) < 0.4
    version = {True: Router.load(other).version, False: Router.load(router).version}
    assert all(answer["router_version"] == version[answer["metadata"]["is_canary"]] for answer in first)
    assert [api.post({"prompt": p}).json()["metadata"]["is_canary"] for p in prompts[:20]] == canaries[:20]


def test_a_shadow_is_asked_and_logged_and_not_used(
    api: Api, router: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    api.post({"prompt": "name a big river"})  # the cached reading lacks the shadow's estimate
    api.settle()
    api.configure(router=router, shadow=other)
    with caplog.at_level("INFO", "ray.serve"):
        answer = api.post({"prompt": "name a big river", "tolerance": 0.0}).json()
        api.settle()
    (record,) = [r for r in caplog.records if getattr(r, "route_id", None) == answer["request_id"]]
    assert answer["selected_model"] == "big"
    assert answer["router_version"] == Router.load(router).version
    assert record.shadow_target == "small"
    assert record.shadow_version == Router.load(other).version


def test_an_engine_closes_once_its_last_prompt_is_done(router: str) -> None:
    async def scenario() -> None:
        endpoint = Endpoint()
        await endpoint.configure(Settings(router=router, open=True))
        engine = endpoint.now.engine
        asked = [asyncio.create_task(endpoint.route(RouteRequest(prompt=f"{i} {QUESTION}"), "id")) for i in range(5)]
        closing = asyncio.create_task(engine.close())
        assert {(await task).selected_model for task in asked} <= {"big", "small"}
        await closing
        with pytest.raises(RuntimeError):
            await engine.tokenize(QUESTION)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("patience_s", "refused"),
    [
        ((0.5, 2.0), [True, False]),
        ((0.5, 0.5), [True, True]),
        ((0.5, 0.7, 2.0, 2.0), [True, True, False, False]),
        ((2.0, 0.5), [False, False]),  # the reading is in progress
    ],
)
def test_nobody_is_refused_for_another_callers_lack_of_patience(
    router: str, monkeypatch: pytest.MonkeyPatch, patience_s: tuple[float, ...], refused: list[bool]
) -> None:
    """Although equal prompts that arrive together share a reading."""

    async def scenario() -> list[Any]:
        endpoint = Endpoint()
        await endpoint.configure(Settings(router=router, open=True))
        monkeypatch.setattr(BatchScheduler, "expected_wait_s", 1.0)
        asked = (endpoint.read(RouteRequest(prompt=QUESTION), seconds) for seconds in patience_s)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await endpoint.now.engine.close()
        return answers

    answers = asyncio.run(scenario())
    assert [isinstance(answer, Overloaded) for answer in answers] == refused
    assert all(isinstance(answer, Overloaded | Routing) for answer in answers)


def test_prompts_are_logged_only_when_asked_for(api: Api, router: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = "what is ninety nine of the old town"
    with caplog.at_level("DEBUG", "ray.serve"):
        api.post({"prompt": secret})
        api.post({"prompt": secret, "models": ["nobody"]})
        api.post({"prompt": secret, "oops": 1})
        api.settle()
    assert "routed" in caplog.messages
    assert secret not in "".join(str(vars(record)) for record in caplog.records)
    api.configure(router=router, log_prompts=True)
    with caplog.at_level("INFO", "ray.serve"):
        api.post({"prompt": secret})
        api.settle()
    assert any(getattr(record, "prompt", None) == secret for record in caplog.records)


def test_strangers_go_to_the_safe_target(api: Api, router: str) -> None:
    stranger = "6 " * 200
    assert api.post({"prompt": stranger}).json()["metadata"]["drift"]["percentile"] == 1.0
    api.configure(router=router, tolerance=0.0, safe={"target": "small", "beyond": 0.99})
    answer = api.post({"prompt": stranger, "explain": True}).json()
    assert answer["selected_model"] == "small"
    assert answer["reasons"]["small"]["code"] == "safe_target"
    assert answer["metadata"]["drift"]["is_out_of_distribution"]
    assert api.post({"prompt": stranger, "model": "big"}).json()["selected_model"] == "big"
    assert not api.post({"prompt": QUESTION}).json()["metadata"]["drift"]["is_out_of_distribution"]


def test_until_it_is_ready_it_says_what_it_waits_for(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, ledger, said = Endpoint(), LocalLedger(), list[str]()
    with TestClient(create_api(endpoint, ledger), "http://127.0.0.1") as client:

        def asked_first(function: Any) -> Any:
            def called(*arguments: Any) -> Any:
                answer = client.get("/ready")
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
                said.append(answer.json()["error"]["message"])
                return function(*arguments)

            return called

        for name in ("_heads", "SensorSet"):
            monkeypatch.setattr(serving, name, asked_first(getattr(serving, name)))
        Api(client, endpoint, ledger).configure(router=router)
        assert client.get("/ready").json() == {"status": "ok"}
    assert said == [
        f"not ready: waiting for {what}: try again in a few seconds"
        for what in ("the router to load", "the encoder to load")
    ]


# --- documents ---------------------------------------------------------------------------------------------------


def test_the_openapi_document_says_what_is_answered(api: Api) -> None:
    document = api.client.get("/openapi.json").raise_for_status().json()
    routing = {"/v1/route", "/v1/route/batch", "/v1/router", "/v1/status", "/health", "/ready"}
    gateway = {f"/v1/{name}" for name in ("chat/completions", "responses", "models", "stats", "feedback")}
    messages = {"/v1/messages", "/v1/messages/count_tokens"}
    assert set(document["paths"]) == routing | gateway | messages
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert operation["description"] or operation["summary"]
    assert document["components"]["schemas"]["RouteRequest"]["examples"]
    assert set(document["paths"]["/v1/route"]["post"]["responses"]) >= {"200", "400", "401", "413", "429", "503"}


def test_the_documents_page_asks_no_other_host(api: Api) -> None:
    page = api.client.get("/docs").raise_for_status().text
    assert "http://" not in page
    assert "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"docs/static/{name}" in page
        assert api.client.get(f"/docs/static/{name}").status_code == 200
