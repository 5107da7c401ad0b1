"""Calls of one protocol, answered by upstreams of the other: official clients on both sides."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from gateway import PRICES, Gateway, renewed_pool, write_pool
from upstream import Call, Fault, Upstream

ASKED = "what is one plus two"
TEXT = 'Straße 漢字 🎉 \\ " \u2028 <tag>'  # \u2028 ends a line in some parsers
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: list[Any] = [
    {"name": name, "description": f"The {name}", "input_schema": SCHEMA} for name in ("weather", "tides")
]
FUNCTIONS: list[Any] = [
    {"type": "function", "function": {"name": tool["name"], "parameters": tool["input_schema"]}} for tool in TOOLS
]
PIXEL = "iVBORw0KGgo="


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    """A gateway with a target of each protocol: "big" is Anthropic's, "small" OpenAI's."""
    folder = tmp_path_factory.mktemp("translated")
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}
        pool = write_pool(folder / "pool.toml", upstreams, **_protocols())
        yield stack.enter_context(Gateway(router=router, pool=pool)), upstreams


def _protocols(**way: Any) -> dict[str, Any]:
    return {
        "big": {"upstream": {"protocol": "anthropic", "responses": False, **way}},
        "small": {"upstream": {"protocol": "openai", **way}},
    }


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Upstream]]) -> Gateway:
    return served[0]


_number = 0


@pytest.fixture
def upstreams(served: tuple[Gateway, dict[str, Upstream]], tmp_path: Path) -> dict[str, Upstream]:
    """Working upstreams with empty logs and closed breakers."""
    global _number
    _number += 1
    gateway, upstreams = served
    for upstream in upstreams.values():
        upstream.faults()
        upstream.calls.clear()
        upstream._prefixes.clear()
    pool = write_pool(tmp_path / "pool.toml", upstreams, **_protocols(concurrency=200 + _number))
    gateway.configure(pool=pool, gateway={})
    return upstreams


@pytest.fixture
def claude(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


def message(client: anthropic.Anthropic, model: str, text: str = ASKED, **fields: Any) -> anthropic.types.Message:
    fields = {"messages": [{"role": "user", "content": text}], "max_tokens": 1000, **fields}
    return client.messages.create(model=model, **fields)


def streamed(client: anthropic.Anthropic, model: str, text: str = ASKED, **fields: Any) -> anthropic.types.Message:
    fields = {"messages": [{"role": "user", "content": text}], "max_tokens": 1000, **fields}
    with client.messages.stream(model=model, **fields) as stream:
        return stream.get_final_message()


def chat(client: openai.OpenAI, model: str, text: str = ASKED, **fields: Any) -> Any:
    return client.chat.completions.create(model=model, **{"messages": [{"role": "user", "content": text}], **fields})


def text_of(answer: anthropic.types.Message) -> str:
    return "".join(block.text for block in answer.content if block.type == "text")


# --- the official clients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["big", "small"])
@pytest.mark.parametrize("ask", [message, streamed])
def test_anthropics_client_is_answered_by_either_protocol(
    claude: anthropic.Anthropic, upstreams: dict[str, Upstream], ask: Any, model: str
) -> None:
    answer = ask(claude, model, TEXT, system="be brief")
    assert text_of(answer) == f"{model}: {TEXT}"
    assert (answer.model, answer.role, answer.stop_reason) == (model, "assistant", "end_turn")
    billed = upstreams[model].completions[-1].wait().billed
    assert billed is not None
    usage = answer.usage
    cached = usage.cache_read_input_tokens or 0
    assert usage.input_tokens + (usage.cache_creation_input_tokens or 0) + cached == billed.prompt_tokens
    assert usage.output_tokens == billed.completion_tokens


@pytest.mark.parametrize("model", ["big", "small"])
def test_openais_client_is_answered_by_either_protocol(
    gateway: Gateway, upstreams: dict[str, Upstream], model: str
) -> None:
    answer = chat(gateway.client, model, TEXT)
    (choice,) = answer.choices
    assert (answer.model, choice.message.content, choice.finish_reason) == (model, f"{model}: {TEXT}", "stop")
    billed = upstreams[model].completions[-1].wait().billed
    assert billed is not None

    assert answer.usage.prompt_tokens == billed.prompt_tokens
    assert answer.usage.completion_tokens == billed.completion_tokens


@pytest.mark.parametrize("has_usage", [False, True])
def test_openais_client_reads_a_message_stream(
    gateway: Gateway, upstreams: dict[str, Upstream], has_usage: bool
) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if has_usage else {}
    chunks = list(chat(gateway.client, "big", TEXT, stream=True, **options))
    assert {chunk.model for chunk in chunks} == {"big"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == f"big: {TEXT}"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    billed = upstreams["big"].completions[-1].wait().billed
    assert billed is not None
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == (
        [(billed.prompt_tokens, billed.completion_tokens)] if has_usage else []
    )


@pytest.mark.parametrize("ask", [message, streamed])
def test_parallel_tool_calls_of_a_chat_reach_anthropics_client(
    claude: anthropic.Anthropic, upstreams: dict[str, Upstream], ask: Any
) -> None:
    asked = f"weather and tides {TEXT}"
    answer = ask(claude, "small", asked, tools=TOOLS)
    assert answer.stop_reason == "tool_use"
    calls = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
    assert calls == [(name, {"city": f"small: {asked}", "days": 1}) for name in ("weather", "tides")]


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_tool_calls_of_a_message_reach_openais_client(
    gateway: Gateway, upstreams: dict[str, Upstream], stream: bool
) -> None:
    asked = f"weather and tides {TEXT}"
    answer = chat(gateway.client, "big", asked, tools=FUNCTIONS, stream=stream)
    model, _said, calls = _chunks_of(answer) if stream else _whole_of(answer)
    assert model == "big"
    given = {"city": f"big: {asked}", "days": 1}
    # A stream's pieces pass byte for byte; an object is written as models write it.
    arguments = json.dumps(given) if stream else json.dumps(given, ensure_ascii=False, separators=(",", ":"))
    assert calls == [["weather", arguments], ["tides", arguments]]


# --- the same protocol -----------------------------------------------------------------------------------------------


def test_a_message_passes_unchanged_to_its_own_protocol(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    body = {
        "model": "big",
        "max_tokens": 77,
        "system": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
        "unheard_of": {"deep": [1, None]},
    }
    headers = {"anthropic-beta": "context-management-2025-06-27", "anthropic-version": "2099-01-01"}
    answer = gateway.post("/v1/messages", {**body, "tolerance": 0.1}, headers=headers)
    assert answer.status_code == 200
    assert "x-router-dropped" not in answer.headers
    (call,) = upstreams["big"].completions
    assert call.body == {**body, "model": "big-1"}
    assert {name: call.headers[name] for name in headers} == headers
    assert call.path == "/v1/messages"


def test_the_stream_of_the_own_protocol_is_passed_as_bytes(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    body = {"max_tokens": 50, "messages": [{"role": "user", "content": TEXT}], "stream": True}
    direct = httpx.post(f"{upstreams['big'].url}/messages", json={**body, "model": "big-1"}).text
    passed = gateway.post("/v1/messages", {**body, "model": "big"}).text
    same = [line for line in direct.splitlines() if "message_start" not in line]
    assert [line for line in passed.splitlines() if "message_start" not in line] == same


# --- what does not translate -----------------------------------------------------------------------------------------


def test_fields_that_the_target_does_not_get_are_named(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    block = {"type": "text", "text": ASKED, "cache_control": {"type": "ephemeral"}}
    body = {"model": "small", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}], "top_k": 5}
    answer = gateway.post("/v1/messages", body)
    assert answer.headers["x-router-dropped"] == "cache_control, top_k"
    assert upstreams["small"].completions[-1].body == {
        "model": "small-1",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": ASKED}],
    }


def test_a_target_that_cannot_be_asked_is_excluded_by_name(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    answer = gateway.chat(ASKED, model="auto", logprobs=True)
    assert answer.headers["x-router-selected-model"] == "small"
    assert answer.headers["x-router-excluded"] == "big (logprobs)"
    refused = gateway.chat(ASKED, model="big", logprobs=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_target")
    assert refused.json()["error"]["message"].endswith("not translatable for big (logprobs)")
    assert not upstreams["big"].completions


def test_a_target_of_the_other_protocol_gets_no_responses(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    answer = gateway.post("/v1/responses", {"model": "auto", "input": ASKED})
    assert answer.headers["x-router-selected-model"] == "small"
    assert answer.headers["x-router-excluded"] == "big (POST /v1/responses)"


# --- errors, keys, counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404, "not_found_error"),
        ({"model": "big", "messages": []}, 400, "invalid_request_error"),
        ({"model": 7}, 400, "invalid_request_error"),
        ({"model": "big", "messages": [{"role": "user", "content": "x"}]}, 400, "invalid_request_error"),
    ],
)
def test_errors_have_the_shape_of_the_callers_protocol(
    gateway: Gateway, upstreams: dict[str, Upstream], body: Any, status: int, kind: str
) -> None:
    answer = gateway.post("/v1/messages", body)
    assert answer.status_code == status
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", kind)
    assert error["error"]["message"]


def test_a_failed_stream_ends_with_an_error_of_the_callers_protocol(
    claude: anthropic.Anthropic, gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    for name in ("big", "small"):
        upstreams[name].faults(Fault.CUT)
        with pytest.raises(anthropic.APIStatusError, match="before the answer was complete"):
            streamed(claude, name)
        upstreams[name].faults(Fault.CUT)
        with pytest.raises(openai.APIError, match="before the answer was complete"):
            list(chat(gateway.client, name, stream=True))


def test_an_upstream_of_the_other_protocol_is_the_fallback(
    claude: anthropic.Anthropic, gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    first = chat(gateway.client, "auto").model
    other = {"big": "small", "small": "big"}[first]
    for fault in (Fault.ERROR, Fault.OVERLOADED, Fault.ERROR_FIRST, Fault.RESET, Fault.BAD_REQUEST):
        upstreams[first].faults(fault)
        assert chat(gateway.client, "auto").model == other
        upstreams[first].faults(fault)
        assert streamed(claude, "auto").model == other


def test_tokens_are_counted_by_an_upstream_or_estimated(
    claude: anthropic.Anthropic, gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    asked: Any = [{"role": "user", "content": ASKED}]
    for model in ("auto", "big"):
        counted = claude.messages.with_raw_response.count_tokens(model=model, messages=asked)
        assert counted.parse().input_tokens == len(ASKED.split())
        assert "x-router-estimated" not in counted.headers
    estimated = claude.messages.with_raw_response.count_tokens(model="small", messages=asked, tools=TOOLS)
    assert estimated.parse().input_tokens > len(ASKED.split())
    assert estimated.headers["x-router-estimated"] == "encoder"
    assert [call.path for call in upstreams["small"].calls] == []


def test_a_conversation_keeps_its_target_when_cache_breakpoints_move(
    gateway: Gateway, upstreams: dict[str, Upstream]
) -> None:
    def block(text: str, **more: Any) -> Any:
        return [{"type": "text", "text": text, **more}]

    marked = {"cache_control": {"type": "ephemeral"}}
    said = [{"role": "user", "content": block(ASKED, **marked)}]
    first = gateway.post("/v1/messages", {"model": "auto", "max_tokens": 50, "messages": said})
    name = first.headers["x-router-selected-model"]
    said = [
        {"role": "user", "content": block(ASKED)},
        {"role": "assistant", "content": first.json()["content"]},
        {"role": "user", "content": block("and three", **marked)},
    ]
    gateway.configure(gateway={"stick_margin": 1.0})
    second = gateway.post("/v1/messages", {"model": "auto", "max_tokens": 50, "messages": said})
    assert second.headers["x-router-selected-model"] == name


def test_costs_count_all_input_of_a_message(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    before = gateway.stats()
    for stream in (False, True):
        gateway.post(
            "/v1/messages",
            {"model": "big", "max_tokens": 50, "messages": [{"role": "user", "content": ASKED}], "stream": stream},
        )
    expected = sum(_usd("big", call) for call in upstreams["big"].completions)
    after = _stats_after(gateway, before, 2)
    assert after["actual_cost_usd"] - before["actual_cost_usd"] == pytest.approx(expected, rel=1e-9)


def _stats_after(gateway: Gateway, before: Any, num_calls: int) -> Any:
    """The stats once so many further calls are recorded, which is after their answers were sent."""
    deadline = time.monotonic() + 30.0
    while (after := gateway.stats())["calls"] - before["calls"] < num_calls and time.monotonic() < deadline:
        pass
    return after


# --- agents ----------------------------------------------------------------------------------------------------------

TURNS = 50


def _asked(turn: int, agent: str) -> str:
    return f"{agent} {turn}: weather and tides {TEXT}"


def _result(turn: int, name: str) -> str:
    return f"{name} of turn {turn}: {TEXT}"


@pytest.mark.slow("110 calls, each with the whole conversation")
def test_a_session_of_an_agent_by_anthropics_client_on_a_chat(
    claude: anthropic.Anthropic, upstreams: dict[str, Upstream]
) -> None:
    """Parallel tools in each turn, a sub-agent with its own system prompt every tenth, streamed every other time."""
    sessions: dict[str, list[Any]] = {"sub": [], "main": []}
    for turn in range(TURNS):
        for agent in ["sub", "main"] if turn % 10 == 0 else ["main"]:
            ask, said = streamed if turn % 2 else message, sessions[agent]
            fields: Any = {"tools": TOOLS, "system": [{"type": "text", "text": f"You are {agent}."}]}
            said.append({"role": "user", "content": [{"type": "text", "text": _asked(turn, agent)}]})
            called = ask(claude, "small", messages=said, **fields)
            blocks = [block for block in called.content if block.type == "tool_use"]
            assert [block.input["city"] for block in blocks] == [f"small: {_asked(turn, agent)}"] * 2
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": _result(turn, block.name)}
                for block in blocks
            ]
            said += [{"role": "assistant", "content": called.content}, {"role": "user", "content": results}]
            answer = ask(claude, "small", messages=said, **fields)
            assert text_of(answer) == f"small: {_result(turn, 'tides')}"
            said.append({"role": "assistant", "content": answer.content})
    system, *received = upstreams["small"].completions[-1].body["messages"]
    assert system == {"role": "system", "content": "You are main."}
    rounds = [received[start : start + 5] for start in range(0, len(received), 5)]
    assert len(rounds) == TURNS
    for turn, exchange in enumerate(rounds):
        assert [each["role"] for each in exchange[:4]] == ["user", "assistant", "tool", "tool"]
        assert [call["id"] for call in exchange[1]["tool_calls"]] == [each["tool_call_id"] for each in exchange[2:4]]
        assert [each["content"] for each in exchange[2:4]] == [_result(turn, tool["name"]) for tool in TOOLS]


@pytest.mark.slow("100 calls, each with the whole conversation")
def test_a_session_of_an_agent_by_openais_client_on_messages(gateway: Gateway, upstreams: dict[str, Upstream]) -> None:
    said: list[Any] = [{"role": "developer", "content": "You are main."}]
    for turn in range(TURNS):
        said.append({"role": "user", "content": _asked(turn, "main")})
        called = chat(gateway.client, "big", messages=said, tools=FUNCTIONS).choices[0].message
        said.append(called.model_dump(exclude_none=True))
        for call in called.tool_calls:
            assert json.loads(call.function.arguments)["city"] == f"big: {_asked(turn, 'main')}"
            said.append({"role": "tool", "tool_call_id": call.id, "content": _result(turn, call.function.name)})
        answer = chat(gateway.client, "big", messages=said, tools=FUNCTIONS).choices[0].message
        assert answer.content == f"big: {_result(turn, 'tides')}"
        said.append({"role": "assistant", "content": answer.content})
    received = upstreams["big"].completions[-1].body
    assert received["system"] == [{"type": "text", "text": "You are main."}]
    turns = received["messages"]
    assert [turn["role"] for turn in turns] == [*["user", "assistant"] * (2 * TURNS - 1), "user"]
    for turn, (called, results) in enumerate(zip(turns[1::4], turns[2::4], strict=True)):
        assert [block["id"] for block in called["content"]] == [block["tool_use_id"] for block in results["content"]]
        assert [block["content"] for block in results["content"]] == [_result(turn, tool["name"]) for tool in TOOLS]


# --- many calls ------------------------------------------------------------------------------------------------------

CALLS = 600
FAULTS = [fault for fault in Fault if fault not in (Fault.NO_QUOTA, Fault.SLOW_HEAD)]
DOCUMENTED = ("400", "429", "502", "503", "504")


@pytest.mark.slow("600 calls each way, every fourth of whose answers fails")
@pytest.mark.parametrize("protocol", ["anthropic", "openai"])
def test_calls_across_protocols_are_answered_once_or_fail_as_documented(
    served: tuple[Gateway, dict[str, Upstream]], tmp_path: Path, protocol: str
) -> None:
    gateway, upstreams = served
    gateway.configure(pool=renewed_pool(tmp_path, upstreams, 1.0, protocol=protocol), gateway={})
    for number, upstream in enumerate(upstreams.values()):
        upstream.slow_s = 0.02
        upstream.faults(*FAULTS, rate=0.25, seed=number)
    before = gateway.stats()
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0, timeout=60.0) as claude:
        ask = _by_openai(gateway.client) if protocol == "anthropic" else _by_anthropic(claude)
        with ThreadPoolExecutor(16) as threads:
            outcomes = list(threads.map(ask, range(CALLS)))
    after = _stats_after(gateway, before, CALLS)
    assert set(outcomes) <= {"big", "small", "stream failed", *DOCUMENTED}, Counter(outcomes)
    answered = {(outcome, number) for number, outcome in enumerate(outcomes) if outcome in upstreams}
    assert len(answered) > CALLS / 2
    made = [(name, _number_in(call), call) for name, each in upstreams.items() for call in each.completions]
    asked = Counter((name, number) for name, number, _ in made if number is not None)
    assert max(asked.values()) == 1  # no target is asked twice
    assert (after["calls"] - before["calls"], after["reserved_usd"]) == (CALLS, 0.0)
    reported = {
        key: after["charged"]["reported"][key] - before["charged"]["reported"][key] for key in ("calls", "cost_usd")
    }
    billed_usd = [_usd(name, call) for name, number, call in made if (name, number) in answered]
    assert reported == {"calls": len(answered), "cost_usd": pytest.approx(sum(billed_usd), rel=1e-9)}


def _number_in(call: Call) -> int | None:
    """The number of a call, from its text; None for a probe."""
    found = re.search(r"call (\d+):", json.dumps(call.body["messages"]))
    return int(found[1]) if found else None


def _usd(name: str, call: Call) -> float:
    """The cost of a call by what its upstream bills."""
    billed = call.wait().billed
    assert billed is not None
    return (billed.prompt_tokens + 4 * billed.completion_tokens) * PRICES[name] / 1e6


def _text_of_call(number: int) -> str:
    return f"call {number}: weather and tides {TEXT}"


def _by_anthropic(client: anthropic.Anthropic) -> Callable[[int], str]:
    """A call by its number: whole or streamed, with or without tools. Returns the target, or the failure."""

    def ask(number: int) -> str:
        has_tools, text = number % 4 >= 2, _text_of_call(number)
        fields: Any = {"tools": TOOLS} if has_tools else {}
        try:
            answer = (streamed if number % 2 else message)(client, "auto", text, **fields)
        except anthropic.APIStatusError as error:
            return "stream failed" if error.status_code == 200 else str(error.status_code)
        calls = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
        _assert_answered(answer.model, text, text_of(answer), calls, has_tools)
        return answer.model

    return ask


def _by_openai(client: openai.OpenAI) -> Callable[[int], str]:
    def ask(number: int) -> str:
        has_tools, text = number % 4 >= 2, _text_of_call(number)
        fields: Any = {"tools": FUNCTIONS} if has_tools else {}
        try:
            answer = chat(client, "auto", text, stream=bool(number % 2), **fields)
            model, said, calls = _chunks_of(answer) if number % 2 else _whole_of(answer)
        except openai.APIStatusError as error:
            return str(error.status_code)
        except openai.APIError:
            return "stream failed"
        _assert_answered(model, text, said, [(name, json.loads(given)) for name, given in calls], has_tools)
        return model

    return ask


def _assert_answered(model: str, text: str, said: str, calls: list[tuple[str, Any]], has_tools: bool) -> None:
    expected = f"{model}: {text}"
    given = [(tool["name"], {"city": expected, "days": 1}) for tool in TOOLS]
    assert (said, calls) == (("", given) if has_tools else (expected, []))


def _whole_of(answer: Any) -> tuple[str, str, list[list[str]]]:
    """Model, text, and names and arguments of the calls."""
    said = answer.choices[0].message
    calls = [[call.function.name, call.function.arguments] for call in said.tool_calls or []]
    return answer.model, said.content or "", calls


def _chunks_of(chunks: Any) -> tuple[str, str, list[list[str]]]:
    model, said = "", ""
    calls: list[list[str]] = []
    for chunk in chunks:
        model, delta = chunk.model, chunk.choices[0].delta
        said += delta.content or ""
        for call in delta.tool_calls or []:
            if call.function.name:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
    return model, said, calls
