"""Calls through the gateway: routing, pass-through, fallback, broken streams and accounting."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest

from gateway import PRICES, Gateway, write_pool
from mutations import damaged, mutated
from prefill_router.corpus.reader import content_hash
from prefill_router.router.artifact import Router
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.conversation_keys import thread_of
from prefill_serve.gateway.planner import LEDGER_S
from upstream import Call, Fault, Upstream

ASKED = "what is one plus two"
JSON = {"content-type": "application/json"}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},
]
BEFORE_AN_ANSWER = [
    Fault.RATE_LIMIT,
    Fault.NO_QUOTA,
    Fault.ERROR,
    Fault.OVERLOADED,
    Fault.UNAUTHORIZED,
    Fault.NOT_FOUND,
    Fault.BAD_REQUEST,
    Fault.HANG,
    Fault.RESET,
    Fault.EMPTY,
    Fault.NOT_JSON,
    Fault.ERROR_FIRST,
]
SILENT = (Fault.HANG, Fault.RESET, Fault.EMPTY, Fault.NOT_JSON, Fault.CUT, Fault.TRUNCATED)  # no error message
SILENT += (Fault.RESET_MIDWAY, Fault.STALL)
MIDWAY = [Fault.ERROR_MIDWAY, Fault.CUT, Fault.TRUNCATED, Fault.RESET_MIDWAY, Fault.STALL]


@pytest.fixture(scope="module")
def router_of_three(router: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tests' router with a third target, rated like small."""
    loaded = Router.load(router)
    big, small = loaded.pool.targets
    twice = loaded.with_pool(loaded.pool.model_copy(update={"targets": (big, small, small)}))
    named = [target.model_copy(update={"name": name}) for target, name in zip((big, small, small), PRICES, strict=True)]
    out = str(tmp_path_factory.mktemp("three") / "router")
    replace(twice, pool=loaded.pool.model_copy(update={"targets": tuple(named)})).save(out)
    return out


@pytest.fixture(scope="module")
def served(
    router_of_three: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    folder = tmp_path_factory.mktemp("gateway")
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in PRICES}
        pool = write_pool(folder / "pool.toml", upstreams)
        settings: dict[str, Any] = {"router": router_of_three, "pool": pool}
        yield stack.enter_context(Gateway(**settings)), upstreams


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Upstream]], upstreams: dict[str, Upstream]) -> Gateway:
    return served[0]


@pytest.fixture
def upstreams(served: tuple[Gateway, dict[str, Upstream]], router_of_three: str, tmp_path: Path) -> dict[str, Upstream]:
    """Working upstreams with empty logs and closed breakers, behind a rewritten pool."""
    gateway, upstreams = served
    for upstream in upstreams.values():
        upstream.faults()
        upstream.calls.clear()
        upstream.slow_s, upstream.between_chunks_s = 1.0, 0.0
    _configure(gateway, upstreams, tmp_path)
    return upstreams


_number = 0


def _configure(
    served: Gateway, upstreams: dict[str, Upstream], folder: Path, of_targets: Any = None, **settings: Any
) -> None:
    """Configures a changed pool, which resets the breakers, and other settings."""
    global _number
    _number += 1
    fresh = {name: {"upstream": {"concurrency": 200 + _number}} for name in upstreams}
    for name, more in (of_targets or {}).items():
        fresh[name] = {**more, "upstream": {**fresh[name]["upstream"], **more.get("upstream", {})}}
    pool = write_pool(folder / f"pool-{_number}.toml", upstreams, **fresh)
    defaults = {"gateway": {}, "explore": 0.0, "tolerance": None, "cached_prompts": 10_000}
    served.configure(pool=pool, **{**defaults, **settings})


def answering(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    name = response.headers["x-router-selected-model"]
    assert response.json()["model"] == name
    assert response.json()["choices"][0]["message"]["content"].startswith(f"{name}: ")
    return name


def _asked(upstream: Upstream) -> list[Call]:
    """The calls that an upstream got, without the gateway's probes."""
    return [call for call in upstream.completions if call.body.get("messages", [{}])[0].get("content") != "Hi"]


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


# --- the way there -----------------------------------------------------------------------------------------------


def test_a_call_goes_where_the_router_sends_it(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    route = gateway.post("/v1/route", {"messages": [{"role": "user", "content": ASKED}]}).json()
    answer = gateway.chat(ASKED, model="auto")
    assert answering(answer) == route["selected_model"]
    assert float(answer.headers["x-router-p-correct"]) == pytest.approx(
        route["p_correct"][route["selected_model"]], abs=1e-3
    )
    assert answer.headers["x-router-version"] == route["router_version"]
    assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("model", ["auto", "routed", None])
def test_every_field_but_the_routers_own_passes_through(
    gateway: Gateway, upstreams: dict[str, Upstream], model: str | None
) -> None:
    given = {"temperature": 0.25, "seed": 7, "x_unknown": {"deep": ["\U0001f600", None, 1e300]}, "user": "ann"}
    named = {} if model is None else {"model": model}
    wishes = {"tolerance": 0.0, "models": ["big", "mid"], "max_cost_usd": 1.0, "min_p_correct": 0.0}
    name = answering(gateway.chat(ASKED, **given, **named, **wishes))
    (call,) = upstreams[name].completions
    assert call.body == {"messages": [{"role": "user", "content": ASKED}], "model": f"{name}-1", **given}
    assert name in ("big", "mid")


def test_a_target_by_its_name_is_asked_and_no_other(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    assert answering(gateway.chat(ASKED, model="mid")) == "mid"
    upstreams["mid"].faults(Fault.ERROR)
    answer = gateway.chat(ASKED, model="mid")
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_failed"
    assert not upstreams["big"].completions
    assert not upstreams["small"].completions


def test_models_are_those_that_a_call_may_name(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    names = [model.id for model in gateway.client.models.list()]
    assert names == ["auto", "routed", "big", "mid", "small"]
    answer = gateway.chat(ASKED, model="gpt-99")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_key_comes_from_the_environment_and_the_callers_own_stays_here(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MID_KEY", "sk-secret")
    _configure(gateway, upstreams, tmp_path, {"mid": {"upstream": {"key_env": "MID_KEY"}}})
    upstreams["mid"].key = "sk-secret"
    try:
        assert answering(gateway.chat(ASKED, model="mid")) == "mid"
    finally:
        upstreams["mid"].key = None
    (call,) = upstreams["mid"].completions
    assert call.key_matched


def test_one_model_at_two_efforts_is_two_targets(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    way = {"base_url": upstreams["big"].url, "model": "big-1", "system_prefix": "Think."}
    efforts = {
        name: {"upstream": {**way, "extra_body": {"reasoning_effort": effort}, "headers": {"x-tier": effort}}}
        for name, effort in (("mid", "high"), ("small", "low"))
    }
    _configure(gateway, upstreams, tmp_path, efforts)
    before = gateway.stats()["targets"]
    for name, effort in (("mid", "high"), ("small", "low")):
        answer = gateway.chat(ASKED, model=name, reasoning_effort="medium")
        assert (answer.json()["model"], answer.headers["x-router-selected-model"]) == (name, name)
        asked = upstreams["big"].completions[-1]
        assert asked.body == {
            "model": "big-1",
            "messages": [{"role": "system", "content": "Think."}, _user(ASKED)],
            "reasoning_effort": effort,
        }
        assert asked.headers["x-tier"] == effort
    time.sleep(0.05)
    after = gateway.stats()["targets"]
    assert {n: after[n]["answered"] - before.get(n, {"answered": 0})["answered"] for n in efforts} == {
        "mid": 1,
        "small": 1,
    }


@pytest.mark.parametrize(
    ("of_targets", "fields"),
    [
        ({"big": {"tools": False}, "small": {"tools": False}}, {"tools": TOOLS}),
        ({"big": {"context_tokens": 40}, "small": {"context_tokens": 40}}, {"max_tokens": 100}),
        ({"big": {"images": False}, "small": {"images": False}}, {"image": True}),
    ],
)
def test_only_targets_that_can_take_a_call_are_asked(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, of_targets: Any, fields: dict[str, Any]
) -> None:
    _configure(gateway, upstreams, tmp_path, of_targets)
    content: Any = ASKED
    if fields.pop("image", False):
        content = [
            {"type": "text", "text": ASKED},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        ]
    answer = gateway.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields, "tolerance": 0.0}
    )
    assert answer.headers["x-router-selected-model"] == "mid"
    _configure(gateway, upstreams, tmp_path, {**of_targets, "mid": of_targets["big"]})
    refused = gateway.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_target")


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        (b"", 400, "JSON"),
        (b"[1]", 400, "object"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": "hello"}', 400, "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tolerance": 2}', 400, "tolerance"),
        (b'{"messages": [{"role": "user", "content": "x"}], "models": ["nobody"]}', 404, "nobody"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_cost_usd": 0}', 409, "max_cost_usd"),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": 7}', 400, "model"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}', 400, "stream"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_here(
    gateway: Gateway, upstreams: dict[str, Upstream], body: bytes, status: int, what: str
) -> None:
    answer = gateway.http.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == status
    assert what in answer.json()["error"]["message"]
    assert not any(upstream.completions for upstream in upstreams.values())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow("more of the same"))])
def test_damaged_calls_are_answered_in_the_documented_shape(
    gateway: Gateway, upstreams: dict[str, Upstream], seed: int
) -> None:
    dice = random.Random(seed)
    call = {"model": "auto", "messages": [_user(ASKED)], "tools": TOOLS, "tolerance": 0.1, "stream": False, "n": 1}
    for number in range(200 if seed == 0 else 800):
        path = "/v1/responses" if number % 5 == 0 else "/v1/chat/completions"
        whole = {**call, "input": [_user(ASKED)]} if number % 5 == 0 else call
        body = json.dumps(mutated(whole, dice)).encode()
        answer = gateway.http.post(path, content=damaged(body, dice) if number % 3 == 0 else body, headers=JSON)
        if answer.status_code == 200:
            assert answer.headers["x-router-selected-model"] in PRICES
        else:
            failed = answer.json()["error"]
            assert 400 <= answer.status_code < 500 or failed["code"] == "upstream_failed", (answer.text, body)
            assert failed["message"]


def test_what_the_upstream_does_not_take_is_said_in_its_own_words(
    gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    answer = gateway.chat(ASKED, max_tokens=-1)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert sum(len(upstream.completions) for upstream in upstreams.values()) == 1


# --- where upstreams or the router fail --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", BEFORE_AN_ANSWER)
def test_the_next_target_makes_up_for_one_that_fails(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, fault: Fault, stream: bool
) -> None:
    short = {name: {"upstream": {"timeout_s": 0.5}} for name in PRICES}
    _configure(gateway, upstreams, tmp_path, short)
    first = answering(gateway.chat(ASKED))
    upstreams[first].faults(fault)
    answer = gateway.chat(ASKED, stream=stream)
    second = answer.headers["x-router-selected-model"]
    assert second != first
    if stream:
        assert events(answer)[-1] == "[DONE]"
    else:
        assert answering(answer) == second
    assert fault in [call.fault for call in upstreams[first].completions]  # the last may be a probe


@pytest.mark.parametrize("fault", MIDWAY)
def test_a_stream_that_breaks_off_ends_with_an_error_event(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, fault: Fault
) -> None:
    _configure(gateway, upstreams, tmp_path, {"mid": {"upstream": {"timeout_s": 0.5}}})
    upstreams["mid"].faults(fault)
    said = events(gateway.chat(ASKED, model="mid", stream=True))
    assert "[DONE]" not in said
    assert said[-1]["error"]["code"] == "upstream_failed"
    assert all(event["model"] == "mid" for event in said[:-1])
    assert any(event["choices"][0]["delta"].get("content") for event in said[:-1])
    upstreams["mid"].faults(fault)
    stream = gateway.client.chat.completions.create(model="mid", messages=[_user(ASKED)], stream=True)
    with pytest.raises(openai.APIError):
        list(stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", [f for f in BEFORE_AN_ANSWER + MIDWAY if f not in SILENT])
def test_what_an_upstream_quotes_reaches_no_caller_and_no_log(
    gateway: Gateway,
    upstreams: dict[str, Upstream],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    stream: bool,
) -> None:
    """Neither its key, nor the part of a key that providers quote, nor an account id."""
    key = "sk-proj-Ab3dEf6hIj9kLmNoPq"
    monkeypatch.setenv("MID_KEY", key)
    _configure(gateway, upstreams, tmp_path, {"mid": {"upstream": {"key_env": "MID_KEY"}}})
    quoted = ("Ab3d", "NoPq", "org-Secret1")
    upstreams["mid"].quotes = f" Key {key} (Ab3d...NoPq) of org-Secret1, at the end."
    upstreams["mid"].faults(fault)
    try:
        answer = gateway.chat(ASKED, model="mid", stream=stream)
    finally:
        upstreams["mid"].quotes = ""
    assert "upstream_failed" in answer.text or answer.status_code == 400
    logged = "".join(str(vars(record)) for record in caplog.records)
    assert not [part for part in quoted if part in answer.text or part in logged]
    if fault is Fault.BAD_REQUEST:
        assert "The prompt is too long. Key [redacted] ([redacted]) of [redacted], at the end." in answer.text
    else:
        assert "at the end" not in answer.text
        assert "Key [redacted] ([redacted]) of [redacted], at the end." in logged


def test_all_that_fail_are_named_by_the_last(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    for upstream in upstreams.values():
        upstream.faults(Fault.RATE_LIMIT)
    answer = gateway.chat(ASKED)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "upstream_failed"
    assert all(len(_asked(upstream)) == 1 for upstream in upstreams.values())


def test_an_upstream_that_is_dead_is_left_alone_and_one_that_is_slow_holds_nobody_up(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    _configure(gateway, upstreams, tmp_path, {name: {"upstream": {"timeout_s": 0.2}} for name in PRICES})
    dead = answering(gateway.chat(ASKED))
    upstreams[dead].faults(Fault.RESET, rate=1.0)
    slow = answering(gateway.chat(ASKED))
    upstreams[slow].faults(Fault.SLOW_HEAD, rate=1.0)
    served = [answering(gateway.chat(ASKED, seed=i)) for i in range(40)]
    (alive,) = set(PRICES) - {dead, slow}
    assert set(served) == {alive}
    assert 5 <= len(upstreams[dead].completions) <= 10
    assert 5 <= len(upstreams[slow].completions) <= 10
    asked = len(upstreams[slow].completions)
    answering(gateway.chat(ASKED))
    assert len(upstreams[slow].completions) == asked


@pytest.mark.parametrize("default", [None, "mid"])
def test_the_default_target_serves_where_routing_takes_too_long(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, default: str | None
) -> None:
    late = {"route_timeout_s": 1e-6, "default_target": default}
    _configure(gateway, upstreams, tmp_path, gateway=late, cached_prompts=0)
    answer = gateway.chat(f"nobody has asked this of {default}")
    assert answering(answer) == (default or "small")
    assert "x-router-p-correct" not in answer.headers
    upstreams[default or "small"].faults(Fault.ERROR)
    assert answering(gateway.chat(f"nor this of {default}")) == ("small" if default else "mid")


def test_what_the_router_cannot_read_goes_to_the_default_target(
    gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    answer = gateway.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]})
    assert answer.headers["x-router-selected-model"] == "small"


def test_a_caller_who_hangs_up_ends_the_upstreams_work(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    upstreams["mid"].between_chunks_s = upstreams["mid"].slow_s = 0.2
    body = {"model": "mid", "messages": [_user(ASKED)], "stream": True}
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_bytes())
    (call,) = upstreams["mid"].completions
    assert call.wait().client_left
    upstreams["mid"].faults(Fault.SLOW_HEAD)
    with pytest.raises(httpx.ReadTimeout):
        gateway.post("/v1/chat/completions", {**body, "stream": False}, timeout=0.1)
    assert upstreams["mid"].completions[-1].wait().client_left


# --- conversations -----------------------------------------------------------------------------------------------


def _user(text: str) -> Any:
    return {"role": "user", "content": text}


def _turns(first: str, answer: str, then: str) -> list[Any]:
    return [_user(first), {"role": "assistant", "content": answer}, _user(then)]


@pytest.mark.parametrize("by_session", [False, True])
def test_a_conversation_stays_with_its_target(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, by_session: bool
) -> None:
    headers = {"x-session-id": f"s-{_number}"} if by_session else {}
    question = f"{_number} {ASKED}"
    _configure(gateway, upstreams, tmp_path, gateway={"stick_margin": 1.0})

    def ask(messages: list[Any], **fields: Any) -> str:
        answer = gateway.post("/v1/chat/completions", {"messages": messages, **fields}, headers=headers)
        return answer.headers["x-router-selected-model"]

    assert ask([_user(question)], models=["big"]) == "big"
    cheapest = {"tolerance": 1.0}
    assert ask(_turns(question, "Three.", "commit it"), **cheapest) == "big"
    assert ask([*_turns(question, "Three.", "commit it"), *_turns("a", "b", "c")[1:]], **cheapest) == "big"
    if not by_session:
        assert ask(_turns(question + "?", "Three.", "commit it"), **cheapest) == "small"
    _configure(gateway, upstreams, tmp_path, gateway={"stick_margin": 0.0})
    better = gateway.post("/v1/route", {"messages": _turns(question, "Three.", "more"), "tolerance": 0.0}).json()
    if better["p_correct"]["small"] > better["p_correct"]["big"]:
        assert ask(_turns(question, "Three.", "more"), tolerance=0.0) in ("mid", "small")


def test_a_header_says_why_a_conversation_stayed_or_moved(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    session = {"x-claude-code-session-id": f"s-{_number}"}
    _configure(gateway, upstreams, tmp_path, gateway={"quality_usd": 0.0})
    said = [_user(f"{_number} {ASKED}")]

    def ask(**fields: Any) -> tuple[str, str]:
        before = gateway.stats()["calls"]
        answer = gateway.post("/v1/chat/completions", {"messages": said, "tools": TOOLS, **fields}, headers=session)
        gateway.settle(before + 1)
        return answer.headers["x-router-selected-model"], answer.headers.get("x-router-conversation", "begins")

    assert ask(models=["big"]) == ("big", "begins")
    called = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    said += [
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    assert ask(tolerance=1.0) == ("big", "kept: the call carries results of tools")
    assert ask(models=["small"]) == ("small", "moved: big cannot be asked for this call")
    said += _turns("", "Sunny.", "and tomorrow?")[1:]
    assert ask(models=["small"]) == ("small", "kept: the router's choice")
    assert ask(models=["big"]) == ("big", "moved: small cannot be asked for this call")
    target, why = ask(models=["big", "small"], tolerance=1.0)
    assert (target, why.partition(" is ")[0]) == ("small", "moved: P(correct) of small")


def test_a_sub_agent_is_routed_apart_from_its_parent(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    session = {"x-claude-code-session-id": f"s-{_number}"}
    _configure(gateway, upstreams, tmp_path, gateway={"stick_margin": 1.0})

    def ask(tools: list[Any], messages: list[Any], **fields: Any) -> tuple[str, bool]:
        """The target, and whether the call belongs to a conversation that is known."""
        before = gateway.stats()["calls"]
        answer = gateway.post("/v1/chat/completions", {"messages": messages, "tools": tools, **fields}, headers=session)
        gateway.settle(before + 1)
        return answer.headers["x-router-selected-model"], "x-router-conversation" in answer.headers

    search = [{"type": "function", "function": {"name": "search"}}]
    assert ask(TOOLS, [_user("fix it")], models=["big"]) == ("big", False)
    assert ask(search, [_user("find it")], models=["small"]) == ("small", False)
    assert ask(TOOLS, _turns("fix it", "Done.", "and test it"), tolerance=1.0) == ("big", True)
    assert ask(search, _turns("find it", "Here.", "and the other"), tolerance=0.0) == ("small", True)


def test_the_usage_of_a_conversation_prices_its_next_call(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    question = f"{_number} {ASKED}"
    _configure(gateway, upstreams, tmp_path)
    before = gateway.stats()["calls"]
    first = gateway.chat(question, models=["big"]).json()
    gateway.settle(before + 1)
    thread = thread_of(ChatCall({"messages": [_user(question)]}), "", None)
    past = gateway.ledger.conversations.past([thread.own])
    assert past is not None
    assert (past.target, past.input_tokens) == ("big", first["usage"]["prompt_tokens"])
    routed = gateway.post("/v1/route", {"messages": [_user(question)]}).json()
    assert past.counted_tokens == routed["metadata"]["input_tokens"]


def test_an_answer_that_an_upstream_keeps_is_gone_on_from_there(
    gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    first = gateway.client.responses.create(model="auto", input=ASKED, extra_body={"models": ["mid"]})
    assert first.model == "mid"
    time.sleep(0.05)
    before = gateway.stats()
    for stream in (False, True):
        body = {"input": "and then", "previous_response_id": first.id, "stream": stream, "tolerance": 1.0}
        answer = gateway.post("/v1/responses", body)
        assert answer.headers["x-router-selected-model"] == "mid"
        assert "x-router-p-correct" not in answer.headers
    strange = {"input": "and then", "previous_response_id": "resp_of_nobody", "tolerance": 1.0}
    assert "x-router-p-correct" in gateway.post("/v1/responses", strange).headers  # routed as a new conversation
    time.sleep(0.05)
    after = gateway.stats()
    counted = {name: after[name] - before[name] for name in ("answered", "sticky", "by_default")}
    assert counted == {"answered": 3, "sticky": 2, "by_default": 0}


def test_what_only_one_upstream_can_go_on_from_does_not_wait_for_the_router(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    first = gateway.client.responses.create(model="auto", input=ASKED, extra_body={"models": ["mid"]})
    time.sleep(0.05)
    late = {"route_timeout_s": 1e-6, "default_target": "big"}
    _configure(gateway, upstreams, tmp_path, gateway=late, cached_prompts=0)
    body = {"input": "and what then", "previous_response_id": first.id}
    assert gateway.post("/v1/responses", body).headers["x-router-selected-model"] == "mid"


def test_a_stream_of_a_response_has_the_targets_name(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    told = list(gateway.client.responses.create(model="big", input=ASKED, stream=True))
    assert told[0].type == "response.created"
    assert told[-1].type == "response.completed"
    assert told[-1].response.model == "big"
    assert told[-1].response.output_text == f"big: {ASKED}"


# --- money -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_stats_say_what_upstreams_bill(gateway: Gateway, upstreams: dict[str, Upstream], stream: bool) -> None:
    before = gateway.stats()
    for i in range(12):
        text = f"{i} {ASKED}"
        upstreams["big"].faults(Fault.ERROR if i % 4 == 0 else None)
        said = gateway.chat(text, tolerance=0.0 if i % 2 else 1.0, stream=stream)
        if stream:
            assert all(
                event == "[DONE]" or event["choices"] for event in events(said)
            )  # no usage, as none was requested
    time.sleep(0.1)
    after = gateway.stats()
    assert after["answered"] - before["answered"] == 12
    for name, upstream in upstreams.items():
        billed = [call.billed for call in upstream.completions if call.billed is not None]
        was = before["targets"].get(name, {"input_tokens": 0, "output_tokens": 0, "actual_cost_usd": 0.0})
        if not billed:
            continue
        now = after["targets"][name]
        prompt, answer = sum(b.prompt_tokens for b in billed), sum(b.completion_tokens for b in billed)
        assert now["input_tokens"] - was["input_tokens"] == prompt
        assert now["output_tokens"] - was["output_tokens"] == answer
        cost_usd = (prompt * PRICES[name] + answer * 4 * PRICES[name]) / 1e6
        assert now["actual_cost_usd"] - was["actual_cost_usd"] == pytest.approx(cost_usd)


def test_usage_that_was_asked_for_is_passed_on(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    told = events(gateway.chat(ASKED, model="mid", stream=True, stream_options={"include_usage": True}))
    assert told[-2]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(("over_budget", "expected"), [(None, "small"), (0.0, None)])
def test_a_budget_that_is_spent_makes_the_rest_cheap(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, over_budget: float | None, expected: str | None
) -> None:
    budgets = {"usd_per_day": 0.0, "tolerance": over_budget}
    _configure(gateway, upstreams, tmp_path, gateway={"ledger": {"budgets": budgets}}, tolerance=0.0)
    best = gateway.post("/v1/route", {"prompt": ASKED, "tolerance": 0.0}).json()["selected_model"]
    assert answering(gateway.chat(ASKED)) == (expected or best)


def _dear(gateway: Gateway) -> tuple[str, dict[str, float]]:
    """A question that goes to big if cost does not matter, and its expected cost on each target."""
    for number in range(100):
        text = f"what is two plus {number}"
        route = gateway.post("/v1/route", {"messages": [_user(text)], "tolerance": 0.0}).json()
        if route["selected_model"] == "big":
            return text, route["expected_cost_usd"]
    raise AssertionError("no question needs the dear target")


def _until_settled(gateway: Gateway) -> None:
    deadline = time.monotonic() + 60.0
    while gateway.stats()["reserved_usd"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gateway.stats()["reserved_usd"] == 0.0


def test_a_burst_overruns_a_budget_by_no_more_than_expectations_err(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_serve.gateway.planner.LEDGER_S", 30.0)  # this process's loop may be slow
    text, usd = _dear(gateway)
    budget_usd = 5.5 * usd["big"]
    budgets = {"usd_per_day": gateway.stats()["spent_today_usd"] + budget_usd}
    patient = {name: {"upstream": {"timeout_s": 30.0}} for name in PRICES}
    _configure(gateway, upstreams, tmp_path, patient, gateway={"ledger": {"budgets": budgets}}, tolerance=0.0)
    for upstream in upstreams.values():
        upstream.slow_s = 5.0  # long enough for all to be in progress at once
        upstream.faults(Fault.SLOW_HEAD, rate=1.0)
    with ThreadPoolExecutor(24) as callers:
        burst = [callers.submit(gateway.chat, text, stream=number % 2 == 0) for number in range(24)]
        under_way_usd = 0.0
        while not any(call.done() for call in burst):
            under_way_usd = max(under_way_usd, gateway.stats()["reserved_usd"])
            time.sleep(0.05)
    assert Counter(call.result().headers["x-router-selected-model"] for call in burst) == {"big": 5, "small": 19}
    assert under_way_usd == pytest.approx(5 * usd["big"] + 19 * usd["small"])
    _until_settled(gateway)
    billed = [call.billed for call in upstreams["big"].completions if call.billed is not None]
    costs = [(b.prompt_tokens * PRICES["big"] + b.completion_tokens * 4 * PRICES["big"]) / 1e6 for b in billed]
    assert sum(costs) <= budget_usd + sum(cost_usd - usd["big"] for cost_usd in costs)


def test_what_a_call_had_reserved_is_given_back_however_it_ends(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    ledger = {"budgets": {"usd_per_day": 1000.0}}
    _configure(gateway, upstreams, tmp_path, gateway={"ledger": ledger})
    for upstream in upstreams.values():
        upstream.faults(Fault.ERROR)
    assert gateway.chat(ASKED).status_code == 502
    assert gateway.chat(ASKED, max_tokens=-1).status_code == 400
    assert answering(gateway.chat(ASKED, model="mid")) == "mid"
    upstreams["mid"].faults(Fault.CUT, Fault.SLOW_HEAD, Fault.SLOW_CHUNKS)
    assert "error" in events(gateway.chat(ASKED, model="mid", stream=True))[-1]
    body = {"model": "mid", "messages": [_user(ASKED)]}
    with pytest.raises(httpx.ReadTimeout):
        gateway.post("/v1/chat/completions", body, timeout=0.3)
    with gateway.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        pieces = stream.iter_bytes()
        next(pieces)
        assert gateway.stats()["reserved_usd"] > 0.0
    _until_settled(gateway)


def test_while_the_ledger_is_silent_calls_are_thrifty_and_leave_no_reservation(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = {"usd_per_day": 1000.0}
    _configure(gateway, upstreams, tmp_path, gateway={"ledger": {"budgets": budgets}}, tolerance=0.0)
    text, _usd = _dear(gateway)
    assert answering(gateway.chat(text)) == "big"
    reserve = gateway.ledger.reserve

    async def late(*bid: Any) -> int:
        await asyncio.sleep(2 * LEDGER_S)
        return await reserve(*bid)

    monkeypatch.setattr(gateway.ledger, "reserve", late)
    assert answering(gateway.chat(text)) == "small"  # calls neither wait for the ledger nor fail
    time.sleep(3 * LEDGER_S)
    assert gateway.stats()["reserved_usd"] == 0.0


# --- feedback ----------------------------------------------------------------------------------------------------


def test_feedback_is_kept_as_outcomes(gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path) -> None:
    ledger = {"folder": str(tmp_path / "kept"), "keep_prompts": True}
    _configure(gateway, upstreams, tmp_path, gateway={"ledger": ledger})
    answer = gateway.chat(ASKED)
    request_id = answer.headers["x-request-id"]
    given = {"request_id": request_id, "correct": True}
    assert gateway.post("/v1/feedback", given).json() == {"request_id": request_id, "is_new": True}
    assert gateway.post("/v1/feedback", given).json()["is_new"] is False
    other = gateway.post("/v1/feedback", {**given, "correct": False})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "other_feedback")
    routed = gateway.post("/v1/route", {"prompt": ASKED}).json()
    score = {"request_id": routed["request_id"], "score": 0.25, "output_tokens": 9}
    assert gateway.post("/v1/feedback", score).status_code == 200
    unknown = gateway.post("/v1/feedback", {"request_id": "nobody", "correct": True})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
    for bad in ({"request_id": request_id}, {**given, "score": 1.0}, {"request_id": request_id, "score": 1.5}):
        assert gateway.post("/v1/feedback", bad).status_code == 400
    rows = pq.read_table(tmp_path / "kept" / "outcomes").sort_by("correct").to_pylist()
    assert [row["correct"] for row in rows] == [0.25, 1.0]
    assert [row["output_tokens"] for row in rows] == [9, answer.json()["usage"]["completion_tokens"]]
    assert rows[0]["prompt_id"] == content_hash(ASKED)
    assert rows[1]["target"] == answer.json()["model"]
    assert [row["propensity"] for row in rows] == [1.0, 1.0]


def test_without_a_folder_there_is_no_feedback(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    answer = gateway.post("/v1/feedback", {"request_id": "x", "correct": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_feedback")


def test_exploring_asks_every_target_and_says_how_likely_it_was(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    _configure(gateway, upstreams, tmp_path, explore=0.6)
    answers = [gateway.post("/v1/route", {"prompt": ASKED, "explain": True}).json() for _ in range(120)]
    usual = max({a["selected_model"] for a in answers}, key=[a["selected_model"] for a in answers].count)
    for answer in answers:
        is_usual = answer["selected_model"] == usual
        assert answer["metadata"]["propensity"] == pytest.approx(0.6 / 3 + 0.4 * is_usual)
    share = sum(a["selected_model"] == usual for a in answers) / len(answers)
    assert 0.4 < share < 0.8
    assert {a["selected_model"] for a in answers} == set(PRICES)


# --- all of it at once -------------------------------------------------------------------------------------------

MIXED = 600
KINDS = ("plain", "stream", "tool", "streamed tool", "response", "json")


def _ask(gateway: Gateway, number: int) -> str:
    """The outcome of one call with OpenAI's client."""
    dice = random.Random(number)
    kind, model = dice.choice(KINDS), dice.choice(["auto", "auto", "big"])
    text = f"{number} what is {dice.randrange(9)} plus two" + (" call weather" if "tool" in kind else "")
    chat: Any = gateway.client.chat.completions
    said = {"model": model, "messages": [_user(text)]}
    try:
        if kind == "plain":
            assert chat.create(**said).choices[0].message.content.endswith(text)
        elif kind == "stream":
            assert "".join(c.choices[0].delta.content or "" for c in chat.create(**said, stream=True)).endswith(text)
        elif kind == "tool":
            assert chat.create(**said, tools=TOOLS).choices[0].message.tool_calls[0].function.name == "weather"
        elif kind == "streamed tool":
            assert list(chat.create(**said, tools=TOOLS, stream=True))[-1].choices[0].finish_reason == "tool_calls"
        elif kind == "json":
            json.loads(chat.create(**said, response_format={"type": "json_object"}).choices[0].message.content)
        else:
            assert gateway.client.responses.create(model=model, input=text).output_text.endswith(text)
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}"
    except openai.APIError as error:
        return f"broke off: {error.code}"
    return "answered"


def test_mixed_calls_are_answered_or_fail_as_documented_and_are_counted_once(
    gateway: Gateway, upstreams: dict[str, Upstream], tmp_path: Path
) -> None:
    _configure(gateway, upstreams, tmp_path, {name: {"upstream": {"timeout_s": 0.6}} for name in PRICES})
    faults = [*BEFORE_AN_ANSWER, *MIDWAY]
    faults.remove(Fault.STALL)  # as slow as a hang
    for seed, upstream in enumerate(upstreams.values()):
        upstream.faults(*faults, rate=0.2, seed=seed)
    before = gateway.stats()
    with ThreadPoolExecutor(24) as callers:
        ends = Counter(callers.map(partial(_ask, gateway), range(MIXED)))
    time.sleep(0.2)
    after = gateway.stats()
    failures = {f"{status} upstream_failed" for status in (429, 502, 503, 504)}
    assert set(ends) <= failures | {"answered", "400 context_length_exceeded", "broke off: upstream_failed"}
    assert ends["answered"] > 0.9 * MIXED
    assert after["answered"] - before["answered"] == ends["answered"]
    assert after["failed"] - before["failed"] + _refused(after) - _refused(before) == MIXED - ends["answered"]
    answered = {name: after["targets"][name]["answered"] - before["targets"][name]["answered"] for name in PRICES}
    assert sum(answered.values()) == ends["answered"]
    for name, upstream in upstreams.items():  # one may have answered too late
        whole = sum(call.wait().fault in (None, Fault.SLOW_HEAD) for call in _asked(upstream))
        assert 0.97 * whole <= answered[name] <= whole


def _refused(stats: Any) -> int:
    return int(stats["calls"] - stats["answered"] - stats["failed"] - stats["cancelled"])
