"""Calls that one target refuses: others answer, what was refused is left out, and nothing is charged for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from gateway import PRICES, Gateway, write_pool
from provider_refusals import REFUSALS, ProviderRefusal
from upstream import Call, Fault, Upstream

ASKED = "what is one plus two"
NAMES = ("big", "small")
VALUES: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
    "response_format": {"type": "json_object"},
    "stop": ["END"],
    "store": True,
    "user": "ann",
    "max_tokens": 50,
    "parallel_tool_calls": True,
}
TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0.5 with this model.",
    "param": "temperature",
}
LIMIT = {
    "message": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
Refuse = Callable[[dict[str, Any]], tuple[int, Any] | None]


class Refusing(Upstream):
    """An upstream that refuses the calls for which `refuse` returns a status and a body."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.refuse: Refuse = lambda _body: None

    async def _respond(self, request: web.Request, call: Call) -> web.StreamResponse:
        refusal = self.refuse(call.body) if isinstance(call.body, dict) else None
        if refusal is None:
            return await super()._respond(request, call)
        return web.json_response(refusal[1], status=refusal[0])


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Refusing]]]:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Refusing(name, models=(f"{name}-1",))) for name in NAMES}
        pool = write_pool(tmp_path_factory.mktemp("refusals") / "pool.toml", upstreams)
        yield stack.enter_context(Gateway(router=router, pool=pool)), upstreams


_numbers = iter(range(300, 10_000))


def configure(served: tuple[Gateway, dict[str, Refusing]], folder: Path, **more: Any) -> None:
    """Configures targets that have refused nothing, with further settings of their upstreams."""
    gateway, upstreams = served
    fresh = next(_numbers)
    ways = {name: {"upstream": {"concurrency": fresh, "timeout_s": 20.0, **more.get(name, {})}} for name in NAMES}
    gateway.configure(pool=write_pool(folder / f"pool-{fresh}.toml", upstreams, **ways))


@pytest.fixture
def upstreams(served: tuple[Gateway, dict[str, Refusing]], tmp_path: Path) -> dict[str, Refusing]:
    for upstream in served[1].values():
        upstream.faults()
        upstream.calls.clear()
        upstream.refuse = lambda _body: None
    configure(served, tmp_path)
    return served[1]


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Refusing]], upstreams: dict[str, Refusing]) -> Gateway:
    return served[0]


def always(error: dict[str, Any]) -> Refuse:
    return lambda _body: (400, {"error": error})


def refusing(error: dict[str, Any], *names: str) -> Refuse:
    """Refuses calls with one of these fields."""
    return lambda body: (400, {"error": error}) if set(names) & set(body) else None


def content_of(answer: httpx.Response) -> str:
    """The text of an answer, whole or streamed."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return str(answer.json()["choices"][0]["message"]["content"])
    assert answer.text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def asked(upstream: Upstream) -> list[dict[str, Any]]:
    return [call.body for call in upstream.completions]


def billed_usd(upstream: Upstream) -> float:
    billed = [call.billed for call in upstream.completions if call.billed is not None]
    tokens = sum(usage.prompt_tokens + 4 * usage.completion_tokens for usage in billed)
    return tokens * PRICES[upstream.name] / 1e6


def settled(gateway: Gateway, calls: int) -> Any:
    """Stats once this many calls have been recorded."""
    deadline = time.monotonic() + 60.0
    while (stats := gateway.stats())["calls"] < calls and time.monotonic() < deadline:
        time.sleep(0.01)
    return stats


class FirstRefuses:
    """Makes the target that is asked first refuse every attempt of a call; the other answers."""

    def __init__(self, upstreams: dict[str, Refusing], given: ProviderRefusal) -> None:
        self.refuser: str | None = None
        for name, upstream in upstreams.items():
            upstream.refuse = partial(self._answer, name, given)

    def _answer(self, name: str, given: ProviderRefusal, _body: dict[str, Any]) -> tuple[int, Any] | None:
        self.refuser = self.refuser or name
        return (given.status, given.body) if name == self.refuser else None


# --- other targets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_refusal_ends_in_an_answer_while_another_target_gives_one(
    gateway: Gateway, upstreams: dict[str, Refusing], stream: bool
) -> None:
    before = gateway.stats()
    answered = 0
    for given in REFUSALS:
        first = FirstRefuses(upstreams, given)
        name = given.about[1] if len(given.about) > 1 else None
        fields = {name: VALUES.get(name, 0.5)} if name not in (None, "images", "stream_options") else {}
        answer = gateway.chat(ASKED, stream=stream, **fields)
        assert content_of(answer) or given.about[1:2] == ("tools",)
        assert first.refuser is not None
        assert answer.headers["x-router-selected-model"] != first.refuser
        answered += 1
    assert answered / len(REFUSALS) == 1.0
    after = settled(gateway, before["calls"] + answered)
    assert after["answered"] - before["answered"] == answered
    charged = [after["charged"][kind]["calls"] - before["charged"][kind]["calls"] for kind in after["charged"]]
    assert sum(charged) == answered
    usd = sum(billed_usd(upstream) for upstream in upstreams.values())
    charged_usd = after["actual_cost_usd"] - before["actual_cost_usd"]
    # A stream without stream_options reports no usage and is charged what was reserved.
    assert charged_usd >= 0.999 * usd if stream else charged_usd == pytest.approx(usd)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_caller_gets_the_first_refusal_if_all_refuse(
    gateway: Gateway, upstreams: dict[str, Refusing], stream: bool
) -> None:
    before = gateway.stats()
    order: list[str] = []

    def refuse(name: str, _body: dict[str, Any]) -> tuple[int, Any]:
        order.append(name)
        error = {"message": f"{name} says no", "type": "bad", "param": "messages", "code": f"no_{name}"}
        return 422, {"error": error}

    for name, upstream in upstreams.items():
        upstream.refuse = partial(refuse, name)
    answer = gateway.chat(ASKED, stream=stream)
    assert sorted(order) == sorted(NAMES)
    error = {"message": f"{order[0]} says no", "type": "bad", "param": "messages", "code": f"no_{order[0]}"}
    assert (answer.status_code, answer.json()) == (422, {"error": error})
    assert answer.headers["x-router-selected-model"] == order[0]
    after = settled(gateway, before["calls"] + 1)
    assert after["actual_cost_usd"] == before["actual_cost_usd"]
    assert after["failed"] == before["failed"]


@pytest.mark.parametrize(
    ("fault", "status", "code"), [(Fault.OVERLOADED, 503, "upstream_failed"), (Fault.UNAUTHORIZED, 400, "no")]
)
def test_a_retry_is_suggested_only_if_it_may_help(
    gateway: Gateway, upstreams: dict[str, Refusing], fault: Fault, status: int, code: str
) -> None:
    first = gateway.chat(ASKED).headers["x-router-selected-model"]
    (second,) = set(NAMES) - {first}
    upstreams[first].refuse = always({"message": "no", "code": "no"})
    upstreams[second].faults(fault)
    answer = gateway.chat(ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_value_that_no_target_takes_is_refused_at_once(gateway: Gateway, upstreams: dict[str, Refusing]) -> None:
    for upstream in upstreams.values():
        upstream.refuse = refusing({"message": "temperature: must be at most 2", "param": "temperature"}, "temperature")
    assert gateway.chat(ASKED, temperature=3).status_code == 400
    assert sum(len(asked(upstream)) for upstream in upstreams.values()) == 1


def test_refusals_do_not_open_a_breaker(gateway: Gateway, upstreams: dict[str, Refusing]) -> None:
    first = gateway.chat(ASKED).headers["x-router-selected-model"]
    upstreams[first].refuse = always({"message": "no"})
    upstreams[first].calls.clear()
    for number in range(20):
        content_of(gateway.chat(ASKED, seed=number))
    assert len(asked(upstreams[first])) == 20


# --- fields ------------------------------------------------------------------------------------------------------


def test_a_hint_sends_one_call_elsewhere_and_is_left_out_of_the_next(
    gateway: Gateway, upstreams: dict[str, Refusing], caplog: pytest.LogCaptureFixture
) -> None:
    first = gateway.chat(ASKED).headers["x-router-selected-model"]
    upstreams[first].refuse = refusing(TEMPERATURE, "temperature")
    elsewhere = gateway.chat(ASKED, temperature=0.5)
    assert elsewhere.headers["x-router-selected-model"] != first
    assert "x-router-left-out" not in elsewhere.headers
    for _ in range(2):
        answer = gateway.chat(ASKED, temperature=0.5)
        assert content_of(answer).startswith(f"{first}: ")
        assert answer.headers["x-router-left-out"] == "temperature"
    assert [("temperature" in body) for body in asked(upstreams[first])] == [False, True, False, False]
    assert "x-router-left-out" not in gateway.chat(ASKED).headers
    learnt = [record for record in caplog.records if record.message == "upstream refuses a field"]
    assert [vars(record)["field"] for record in learnt] == ["temperature"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_hint_is_left_out_at_once_if_no_other_target_takes_it(
    gateway: Gateway, upstreams: dict[str, Refusing], stream: bool
) -> None:
    for upstream in upstreams.values():
        upstream.refuse = refusing(TEMPERATURE, "temperature")
    answer = gateway.chat(ASKED, temperature=0.5, stream=stream)
    assert content_of(answer).endswith(ASKED)
    assert answer.headers["x-router-left-out"] == "temperature"
    assert sum("temperature" in body for upstream in upstreams.values() for body in asked(upstream)) == 2
    assert sum("temperature" not in body for upstream in upstreams.values() for body in asked(upstream)) == 1


def test_a_limit_is_renamed_and_asked_again_of_the_same_target(
    gateway: Gateway, upstreams: dict[str, Refusing]
) -> None:
    for upstream in upstreams.values():
        upstream.refuse = refusing(LIMIT, "max_tokens")
    names = [gateway.chat(ASKED, max_tokens=50).headers["x-router-selected-model"] for _ in range(2)]
    assert names[0] == names[1]
    limits = [[name for name in body if name.startswith("max_")] for body in asked(upstreams[names[0]])]
    assert limits == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]
    assert sum(len(asked(upstream)) for upstream in upstreams.values()) == 3


def test_a_stream_does_without_stream_options(gateway: Gateway, upstreams: dict[str, Refusing]) -> None:
    error = {"message": "Unrecognized request argument supplied: stream_options"}
    for upstream in upstreams.values():
        upstream.refuse = refusing(error, "stream_options")
    for _ in range(2):
        assert content_of(gateway.chat(ASKED, stream=True)).endswith(ASKED)
    assert [("stream_options" in body) for u in upstreams.values() for body in asked(u)] == [True, False, False]


@pytest.mark.parametrize("names", [("temperature", "seed"), ("max_tokens", "temperature", "stream_options")])
def test_several_refused_fields_are_found_one_by_one(
    gateway: Gateway, upstreams: dict[str, Refusing], names: tuple[str, ...]
) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, Any] | None:
        found = next((name for name in names if name in body), None)
        error = {"message": f"Unsupported parameter: '{found}' is not supported with this model."}
        if found == "max_tokens":
            error = LIMIT
        return None if found is None else (400, {"error": error})

    for upstream in upstreams.values():
        upstream.refuse = refuse
    fields = {"temperature": 0.5, "seed": 1, "max_tokens": 50}
    answer = gateway.chat(ASKED, stream=True, **{name: fields[name] for name in names if name in fields})
    assert content_of(answer).endswith(ASKED)
    assert sum(len(asked(upstream)) for upstream in upstreams.values()) <= 2 * (len(names) + 1)


def test_a_target_that_refuses_whatever_is_left_out_is_given_up(
    gateway: Gateway, upstreams: dict[str, Refusing]
) -> None:
    for upstream in upstreams.values():
        upstream.refuse = always(TEMPERATURE)
    answer = gateway.chat(ASKED, temperature=0.5)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, TEMPERATURE["message"])
    assert [len(asked(upstream)) for upstream in upstreams.values()] == [2, 2]


def test_a_target_without_tools_is_asked_last_for_calls_with_tools(
    gateway: Gateway, upstreams: dict[str, Refusing]
) -> None:
    first = gateway.chat(ASKED).headers["x-router-selected-model"]
    upstreams[first].refuse = refusing({"message": "registry.ollama.ai/library/x does not support tools"}, "tools")
    for _ in range(3):
        assert gateway.chat(ASKED, tools=VALUES["tools"]).headers["x-router-selected-model"] != first
    assert sum("tools" in body for body in asked(upstreams[first])) == 1
    assert gateway.chat(ASKED).headers["x-router-selected-model"] == first


def test_a_call_that_names_its_target_is_sent_and_refused_as_it_is(
    gateway: Gateway, upstreams: dict[str, Refusing]
) -> None:
    upstreams["big"].refuse = refusing(TEMPERATURE, "temperature")
    for _ in range(2):
        answer = gateway.chat(ASKED, model="big", temperature=0.5)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, TEMPERATURE["message"])
    assert [body["temperature"] for body in asked(upstreams["big"])] == [0.5, 0.5]
    assert not asked(upstreams["small"])


def test_the_pool_says_what_is_not_sent_even_if_the_call_names_its_target(
    gateway: Gateway, served: tuple[Gateway, dict[str, Refusing]], tmp_path: Path
) -> None:
    configure(served, tmp_path, big={"drop": ["temperature"], "rename": {"max_tokens": "max_completion_tokens"}})
    assert content_of(gateway.chat(ASKED, model="big", temperature=0.5, max_tokens=50)) == f"big: {ASKED}"
    (body,) = asked(served[1]["big"])
    assert body == {
        "model": "big-1",
        "messages": [{"role": "user", "content": ASKED}],
        "max_completion_tokens": 50,
    }


def test_a_field_that_the_pool_sets_is_not_the_callers_fault(
    gateway: Gateway, served: tuple[Gateway, dict[str, Refusing]], tmp_path: Path
) -> None:
    configure(served, tmp_path, big={"extra_body": {"verbosity": "low"}})
    served[1]["big"].refuse = refusing(
        {"message": "Unknown parameter: 'verbosity'.", "param": "verbosity"}, "verbosity"
    )
    answer = gateway.chat(ASKED, model="big")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
    assert "verbosity" not in answer.text


# --- money and conversations -------------------------------------------------------------------------------------


def test_a_refused_attempt_leaves_no_reservation(gateway: Gateway, upstreams: dict[str, Refusing]) -> None:
    gateway.configure(gateway={"ledger": {"budgets": {"usd_per_day": 1e6, "hard": {"usd_per_day": 1e6}}}})
    try:
        before = gateway.stats()
        for upstream in upstreams.values():
            upstream.refuse = refusing(TEMPERATURE, "temperature")
        assert gateway.chat(ASKED, temperature=0.5).status_code == 200
        upstreams["big"].refuse = upstreams["small"].refuse = always({"message": "no"})
        assert gateway.chat(ASKED).status_code == 400
        after = settled(gateway, before["calls"] + 2)
    finally:
        gateway.configure(gateway={})
    usd = sum(billed_usd(upstream) for upstream in upstreams.values())
    assert after["reserved_usd"] == 0.0
    assert after["spent_today_usd"] - before["spent_today_usd"] == pytest.approx(usd)
    charged = {kind: after["charged"][kind]["calls"] - before["charged"][kind]["calls"] for kind in after["charged"]}
    assert charged == {"reported": 1, "estimated": 0, "reserved": 0}


SEALED = [
    {"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]},
    {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "EqQB"}]},
    {"tool_calls": [{"id": "c", "type": "function", "extra_content": {"google": {"thought_signature": "Cs4B"}}}]},
]


@pytest.mark.parametrize("sealed", [*SEALED, {}])
def test_sealed_reasoning_goes_back_to_where_it_came_from(
    gateway: Gateway, upstreams: dict[str, Refusing], sealed: dict[str, Any]
) -> None:
    question = {"role": "user", "content": f"{next(_numbers)} {ASKED}"}
    said = gateway.post("/v1/chat/completions", {"messages": [question], "models": ["big"]})
    assert said.headers["x-router-selected-model"] == "big"
    settled(gateway, gateway.stats()["calls"])
    answer = {"role": "assistant", "content": "Three.", **sealed}
    then = {"messages": [question, answer, {"role": "user", "content": "and then"}], "tolerance": 1.0}
    gateway.configure(gateway={"stick_margin": 0.0})
    try:
        went = [gateway.post("/v1/chat/completions", {**then, "models": ["small"]}) for _ in range(2)]
    finally:
        gateway.configure(gateway={})
    expected = "big" if sealed else "small"
    assert [answer.headers["x-router-selected-model"] for answer in went] == [expected] * 2


def test_encrypted_reasoning_of_a_response_goes_back_to_where_it_came_from(
    gateway: Gateway, upstreams: dict[str, Refusing]
) -> None:
    question = {"role": "user", "content": f"{next(_numbers)} {ASKED}"}
    gateway.post("/v1/responses", {"input": [question], "models": ["big"]})
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    said = {"type": "message", "role": "assistant", "content": "Three."}
    then = {"input": [question, reasoning, said, {"role": "user", "content": "and then"}], "models": ["small"]}
    assert gateway.post("/v1/responses", then).headers["x-router-selected-model"] == "big"
