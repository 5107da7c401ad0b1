"""Charges of calls for every outcome, and hard limits that no call can exceed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import PRICES, Gateway, gateway_of_two, renewed_pool
from prefill_serve.gateway import proxy as proxy_module
from prefill_serve.gateway.state.call_ledger import LedgerUnavailable
from upstream import Fault, Upstream

ASKED = "what is one plus two"
PATHS = ["/v1/chat/completions", "/v1/responses"]


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    with gateway_of_two(router, tmp_path_factory.mktemp("budgets")) as gateway_and_upstreams:
        yield gateway_and_upstreams


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Upstream]], tmp_path: Path) -> Gateway:
    """Resets upstreams and breakers; budgets are too high to matter."""
    gateway, upstreams = served
    for upstream in upstreams.values():
        upstream.between_chunks_s, upstream.slow_s = 0.0, 30.0
    gateway.configure(pool=renewed_pool(tmp_path, upstreams, 20.0), gateway=with_budgets(usd_per_day=1e6))
    return gateway


@pytest.fixture
def big(served: tuple[Gateway, dict[str, Upstream]]) -> Upstream:
    return served[1]["big"]


def with_budgets(**budgets: Any) -> dict[str, Any]:
    return {"ledger": {"budgets": budgets}}


def limited(gateway: Gateway, usd: float, **hard: Any) -> None:
    """Sets a hard limit for all callers that leaves this much."""
    spent = gateway.stats()["spent_today_usd"]
    gateway.configure(gateway=with_budgets(hard={"usd_per_day": spent + usd, **hard}))


def body(path: str = PATHS[0], text: str = ASKED, **fields: Any) -> dict[str, Any]:
    said = {"input": text} if path == PATHS[1] else {"messages": [{"role": "user", "content": text}]}
    return {"model": "big", **said, **fields}


def cost_usd(input_tokens: int, output_tokens: int, name: str = "big") -> float:
    return (input_tokens + 4 * output_tokens) * PRICES[name] / 1e6


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kinds(stats: Any) -> Counter[str]:
    return Counter({kind: charged["calls"] for kind, charged in stats["charged"].items()})


class Watch:
    """Charges made from now on."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._before = gateway, gateway.stats()

    def charged(self, calls: int = 1) -> tuple[float, dict[str, int]]:
        """Charged USD and calls by kind, once this many calls have ended."""
        before = self._before
        until(lambda: self._gateway.stats()["calls"] - before["calls"] >= calls)
        after = self._gateway.stats()
        assert after["reserved_usd"] == 0.0
        usd = after["spent_today_usd"] - before["spent_today_usd"]
        assert after["actual_cost_usd"] - before["actual_cost_usd"] == pytest.approx(usd, abs=1e-12)
        by_kind = sum(
            charged["cost_usd"] - before["charged"][kind]["cost_usd"] for kind, charged in after["charged"].items()
        )
        assert by_kind == pytest.approx(usd, abs=1e-12)
        return usd, dict(kinds(after) - kinds(before))


def hang_up_once(gateway: Gateway, path: str, seen: bytes, **fields: Any) -> bytes:
    """A stream whose caller disconnects once it has read a given text."""
    got = b""
    with gateway.http.stream("POST", path, json=body(path, stream=True, **fields)) as stream:
        for piece in stream.iter_bytes():
            got += piece
            if seen in got:
                return got
    raise AssertionError(got)


# --- callers who hang up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["big", "auto"])
def test_a_caller_who_hangs_up_with_the_whole_answer_pays_for_it(gateway: Gateway, big: Upstream, model: str) -> None:
    big.between_chunks_s = 0.05  # before the usage
    text = " ".join(f"word{i}" for i in range(12))
    watch = Watch(gateway)
    got = hang_up_once(gateway, PATHS[0], b'"finish_reason":"stop"', model=model, models=["big"], text=text)
    assert b"word11" in got
    usd, how = watch.charged()
    assert sum(how.values()) == 1  # reported, if a slow machine got the usage first
    assert usd >= cost_usd(12, 13)


@pytest.mark.parametrize("path", PATHS)
def test_a_caller_who_hangs_up_early_pays_what_was_reserved(gateway: Gateway, big: Upstream, path: str) -> None:
    big.between_chunks_s = 1.0  # the test waits for none
    watch = Watch(gateway)
    hang_up_once(gateway, path, b"data:")
    usd, how = watch.charged()
    assert how == {"reserved": 1}
    assert usd > 0.0


@pytest.mark.parametrize("path", PATHS)
def test_a_caller_who_does_not_wait_for_a_whole_answer_pays_what_was_reserved(
    gateway: Gateway, big: Upstream, path: str
) -> None:
    big.faults(Fault.SLOW_HEAD)
    watch = Watch(gateway)
    with ThreadPoolExecutor(1) as callers:
        asked = callers.submit(gateway.post, path, body(path), timeout=0.5)
        until(lambda: bool(big.completions))
        reserved_usd = gateway.stats()["reserved_usd"]
        with pytest.raises(httpx.ReadTimeout):
            asked.result()
    assert watch.charged() == (pytest.approx(reserved_usd), {"reserved": 1})
    assert reserved_usd > 0.0


def test_several_answers_are_expected_to_cost_one_input_and_several_outputs(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": ASKED}]
    before = gateway.stats()
    answer = gateway.post(PATHS[0], {"messages": messages, "n": 3}).raise_for_status()
    until(lambda: gateway.stats()["answered"] > before["answered"])
    expected_usd = gateway.stats()["expected_cost_usd"] - before["expected_cost_usd"]
    routed = gateway.post("/v1/route", {"messages": messages}).json()
    name, input_tokens = answer.headers["x-router-selected-model"], routed["metadata"]["input_tokens"]
    one_usd = routed["expected_cost_usd"][name]
    assert expected_usd == pytest.approx(3 * one_usd - 2 * cost_usd(input_tokens, 0, name), rel=1e-6)
    assert expected_usd < 2.99 * one_usd


def test_a_call_that_goes_to_no_upstream_costs_nothing(gateway: Gateway, big: Upstream) -> None:
    watch = Watch(gateway)
    assert gateway.post(PATHS[0], body(max_tokens=-1)).status_code == 400
    big.faults(Fault.ERROR, Fault.UNAUTHORIZED)
    assert [gateway.post(PATHS[0], body()).status_code for _ in range(2)] == [502, 502]
    assert watch.charged(3) == (0.0, {})


# --- upstreams that report nothing, or nonsense ------------------------------------------------------------------


USAGES: list[Any] = [
    None,
    {},
    "many",
    {"prompt_tokens": -5, "completion_tokens": 4},
    {"prompt_tokens": 5, "completion_tokens": -4_000_000},
    {"prompt_tokens": float("nan"), "completion_tokens": float("nan")},
    {"prompt_tokens": 10**30, "completion_tokens": 10**30},
    {"prompt_tokens": 5, "completion_tokens": float("inf")},
    {"prompt_tokens": 5, "completion_tokens": True},
    {"prompt_tokens": 5, "completion_tokens": 0},
    {"prompt_tokens": 5, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 10**7}},
    {"prompt_tokens": 5, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": -(10**7)}},
]


@pytest.mark.parametrize("usage", USAGES, ids=[str(number) for number in range(len(USAGES))])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_a_usage_that_can_be_is_charged_by_its_text(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, usage: Any, stream: bool
) -> None:
    monkeypatch.setattr("openai_protocol.Usage.chat", lambda _: usage)
    watch = Watch(gateway)
    answer = gateway.post(PATHS[0], body(text="word " * 5000, stream=stream))
    assert answer.status_code == 200
    usd, how = watch.charged()
    assert how == {"estimated": 1}
    assert usd == pytest.approx(cost_usd(8333, 8333), rel=0.01)  # 25,000 bytes each way


def test_an_interim_usage_is_not_the_last_word(
    gateway: Gateway, big: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "openai_protocol.ChatReply._chunk"
    said = {"usage": {"prompt_tokens": 1, "completion_tokens": 0}}
    monkeypatch.setattr(head, lambda reply: reply._head("chat.completion.chunk") | said)
    big.between_chunks_s = 0.02
    watch = Watch(gateway)
    hang_up_once(gateway, PATHS[0], b"word9", text=" ".join(f"word{i}" for i in range(40)))
    usd, _ = watch.charged()
    assert usd > cost_usd(1, 10)


# --- attempts that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.ERROR_MIDWAY, Fault.RESET_MIDWAY])
def test_a_stream_that_breaks_off_is_charged(gateway: Gateway, big: Upstream, fault: Fault) -> None:
    big.faults(fault)
    watch = Watch(gateway)
    assert "error" in gateway.post(PATHS[0], body(stream=True, text="word " * 5000)).text
    usd, how = watch.charged()
    assert how == {"estimated": 1}
    assert usd == pytest.approx(cost_usd(8333, 4167), rel=0.01)


@pytest.mark.parametrize(("fault", "is_billed"), [(Fault.CUT, True), (Fault.RESET, True), (Fault.ERROR, False)])
def test_a_call_that_a_second_target_answers_is_charged_for_both(
    gateway: Gateway, big: Upstream, fault: Fault, is_billed: bool
) -> None:
    watch = Watch(gateway)
    failed = next(iter(gateway.post(PATHS[0], body(model="auto")).headers.get_list("x-router-selected-model")))
    first_usd, _ = watch.charged()
    watch = Watch(gateway)
    text = f"{ASKED} [[fault:{fault}@{failed}]]"
    answer = gateway.post(PATHS[0], body(model="auto", models=["big", "small"], text=text))
    assert answer.status_code == 200
    usd, how = watch.charged()
    assert first_usd > 0.0
    assert answer.headers["x-router-selected-model"] != failed
    assert how == ({"reported": 1, "reserved": 1} if is_billed else {"reported": 1})
    assert usd > 0.0


# --- hard limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", ["big", "auto"])
def test_what_a_hard_limit_has_no_room_for_is_refused(gateway: Gateway, big: Upstream, path: str, model: str) -> None:
    limited(gateway, 0.0)
    before = gateway.stats()
    for stream in (False, True):
        answer = gateway.post(path, body(path, model=model, stream=stream))
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert error["code"] == "budget_exceeded"
        midnight = datetime.combine(datetime.now(UTC).date() + timedelta(days=1), datetime.min.time(), UTC)
        assert f"{midnight:%Y-%m-%dT%H:%M:%SZ}" in error["message"]
        assert "all callers" in error["message"]
        wait_s = (midnight - datetime.now(UTC)).total_seconds()
        assert int(answer.headers["retry-after"]) == pytest.approx(wait_s, abs=30)
    assert not big.completions
    until(lambda: gateway.stats()["calls"] == before["calls"] + 2)
    after = gateway.stats()
    assert (after["failed"], after["spent_today_usd"]) == (before["failed"], before["spent_today_usd"])


@pytest.mark.parametrize("model", ["big", "auto"])
def test_a_hard_limit_holds_under_calls_that_come_at_once(
    gateway: Gateway, big: Upstream, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    fields = {"model": model, "models": ["big"], "max_tokens": 100}
    most_usd = cost_usd(len(json.dumps(body(**fields))), 100)
    limited(gateway, 5.5 * most_usd)
    before_usd = gateway.stats()["spent_today_usd"]
    with ThreadPoolExecutor(24) as callers:
        under_way = _all_at_once(gateway, monkeypatch, 24)
        asked = [callers.submit(gateway.post, PATHS[0], body(**fields, stream=n % 2 == 0)) for n in range(24)]
        answers = [call.result() for call in asked]
    assert Counter(answer.status_code for answer in answers) == {200: 5, 429: 19}
    assert len(big.completions) == 5
    assert len(under_way) == 24
    assert {int(a.headers["retry-after"]) for a in answers if a.status_code == 429} == {5}  # calls in progress will end
    until(lambda: gateway.stats()["reserved_usd"] == 0.0)
    assert 0.0 < gateway.stats()["spent_today_usd"] - before_usd <= 5.5 * most_usd
    assert gateway.post(PATHS[0], body(**fields)).status_code == 200  # less than their maximum


def _all_at_once(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, num_calls: int) -> list[str]:
    """Delays all records until this many calls were reserved or refused; returns their tickets."""
    reserve, record, tickets = gateway.ledger.reserve, gateway.ledger.record, list[str]()

    async def counted(ticket: str, *bid: Any) -> Any:
        tickets.append(ticket)
        return await reserve(ticket, *bid)

    async def late(*served: Any) -> None:
        while len(tickets) < num_calls:
            await asyncio.sleep(0.01)
        await record(*served)

    monkeypatch.setattr(gateway.ledger, "reserve", counted)
    monkeypatch.setattr(gateway.ledger, "record", late)
    return tickets


@pytest.mark.parametrize(
    "dear",
    [
        {"max_tokens": 10**9},
        {"max_tokens": "1000000"},
        {"max_tokens": 1e6},
        {"max_completion_tokens": 10**6, "max_tokens": 1},
        {"n": 10**5, "max_tokens": 10},
        {"n": "100000", "max_tokens": 10},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 500_000}}]},
    ],
)
def test_a_call_that_could_cost_more_than_is_left_is_refused(
    gateway: Gateway, big: Upstream, dear: dict[str, Any]
) -> None:
    limited(gateway, cost_usd(10_000, 20_000))
    assert gateway.post(PATHS[0], body(**dear)).status_code == 429
    assert not big.completions
    assert gateway.post(PATHS[0], body()).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "limit", [{}, {"max_tokens": "many", "max_output_tokens": []}, {"max_completion_tokens": None}]
)
def test_under_a_hard_limit_an_answer_whose_caller_sets_no_limit_has_one(
    gateway: Gateway, big: Upstream, path: str, limit: dict[str, Any]
) -> None:
    limited(gateway, 1e6, answer_tokens=7)
    assert gateway.post(path, body(path, **limit, stream=True)).status_code == 200
    (call,) = big.completions
    sent = {name: call.body.get(name) for name in call.body if name.startswith("max_")}
    assert {name: tokens for name, tokens in sent.items() if tokens != limit.get(name)} == {
        "max_output_tokens" if path == PATHS[1] else "max_tokens": 7
    }


def test_a_keys_hard_limit_is_its_own(gateway: Gateway) -> None:
    gateway.configure(gateway=with_budgets(hard={"keys": {"": 0.0}}))  # the caller without a key
    answer = gateway.post(PATHS[0], body())
    assert answer.status_code == 429
    assert "$0.00 of $0.00 a day" in answer.json()["error"]["message"]
    gateway.configure(gateway=with_budgets(hard={"keys": {"ann": 0.0}}))
    assert gateway.post(PATHS[0], body()).status_code == 200


def test_a_hard_limit_holds_while_the_ledger_is_silent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_bid: Any) -> int:
        raise LedgerUnavailable("it is gone")

    limited(gateway, 1e6)
    monkeypatch.setattr(gateway.ledger, "reserve", away)
    answer = gateway.post(PATHS[0], body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_away")


def test_below_a_hard_limit_a_soft_one_still_makes_calls_cheap(gateway: Gateway) -> None:
    gateway.configure(gateway=with_budgets(usd_per_day=0.0, hard={"usd_per_day": 1e6}), tolerance=0.0)
    answer = gateway.post(PATHS[0], body(model="auto"))
    assert answer.headers["x-router-selected-model"] == "small"


def test_a_call_that_ends_while_the_ledger_is_away_is_recorded_later(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paid for."""
    monkeypatch.setattr(proxy_module, "_RECORD_AGAIN_S", (0.05, 0.05, 0.05))
    record, tries = gateway.ledger.record, []

    async def away_twice(*arguments: Any) -> None:
        tries.append(arguments[0].call_id)
        if len(tries) < 3:
            raise LedgerUnavailable("it starts again")
        await record(*arguments)

    monkeypatch.setattr(gateway.ledger, "record", away_twice)
    before = gateway.stats()["calls"]
    assert gateway.post(PATHS[0], body()).status_code == 200
    gateway.settle(before + 1)
    assert len(set(tries)) == 1
    assert len(tries) == 3
