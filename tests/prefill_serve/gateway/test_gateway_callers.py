"""Isolation of callers: no single caller can make a target unavailable to the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import Gateway, gateway_of_two, renewed_pool
from prefill_serve.gateway.candidates import RoutedPlan
from upstream import Fault, Upstream

ASKED = "what is one plus two"
KEYS = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("ann", "bob", "eve")}


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    """A gateway with three callers, each of whose keys is the caller's name."""
    folder = tmp_path_factory.mktemp("callers")
    with gateway_of_two(router, folder, open=False, keys=KEYS) as gateway_and_upstreams:
        yield gateway_and_upstreams


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Upstream]], tmp_path: Path) -> Gateway:
    """Resets the upstreams and what the gateway knows of them."""
    gateway, upstreams = served
    gateway.configure(pool=renewed_pool(tmp_path, upstreams, 1.0))
    return gateway


@pytest.fixture
def big(served: tuple[Gateway, dict[str, Upstream]]) -> Upstream:
    return served[1]["big"]


def ask(gateway: Gateway, who: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    said = {"input": ASKED} if path == "/v1/responses" else {"messages": [{"role": "user", "content": ASKED}]}
    return gateway.post(path, {**said, **body}, headers={"authorization": f"Bearer {who}"})


def answering(gateway: Gateway, who: str, **body: Any) -> str:
    """The target that answers a call meant for big; small if big is paused."""
    answer = ask(gateway, who, models=["big", "small"], tolerance=0.0, min_p_correct=0.0, **body)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-router-selected-model"]


@pytest.fixture
def _for_big(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the router prefer big for every prompt."""
    choose = RoutedPlan.choose
    monkeypatch.setattr(RoutedPlan, "choose", lambda plan, among: choose(plan, ["big"] if "big" in among else among))


@pytest.mark.usefixtures("_for_big")
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.NOT_FOUND, 502),  # the answer to an unknown previous_response_id
        (Fault.UNAUTHORIZED, 502),
        (Fault.BAD_REQUEST, 400),
        (Fault.RATE_LIMIT, 429),
        (Fault.NO_QUOTA, 429),
        (Fault.ERROR, 502),
        (Fault.OVERLOADED, 503),
        (Fault.RESET, 502),
        (Fault.ERROR_FIRST, 502),
        (Fault.NOT_JSON, 502),
    ],
)
def test_a_caller_whose_calls_fail_breaks_no_target_for_others(
    gateway: Gateway, big: Upstream, path: str, fault: Fault, status: int
) -> None:
    for _ in range(8):  # the target works: other callers and the probe get answers
        text = f"[[fault:{fault}@big]]"
        said = {"input": text} if path == "/v1/responses" else {"messages": [{"role": "user", "content": text}]}
        assert ask(gateway, "eve", path, model="big", **said).status_code == status
    assert [answering(gateway, who) for who in ("ann", "bob", "eve")] == ["big"] * 3


@pytest.mark.usefixtures("_for_big")
def test_a_caller_who_hangs_up_again_and_again_breaks_no_target(gateway: Gateway, big: Upstream) -> None:
    big.faults(*[Fault.SLOW_HEAD] * 8)
    body = {"model": "big", "messages": [{"role": "user", "content": ASKED}]}
    for _ in range(8):
        with pytest.raises(httpx.ReadTimeout):
            gateway.post("/v1/chat/completions", body, headers={"authorization": "Bearer eve"}, timeout=0.05)
    big.faults()
    assert answering(gateway, "ann") == "big"


@pytest.mark.usefixtures("_for_big")
@pytest.mark.parametrize("callers", [["ann"] * 5, ["ann", "bob", "eve", "ann", "bob"]])
def test_a_target_that_is_broken_is_left_alone_whoever_finds_out(
    gateway: Gateway, big: Upstream, callers: list[str]
) -> None:
    big.faults(Fault.RESET, rate=1.0)
    assert [answering(gateway, who) for who in callers] == ["small"] * 5
    if len(set(callers)) == 1:  # one caller's failures are only a doubt: the gateway probes
        while len(big.completions) < 6:
            assert answering(gateway, "ann") == "small"
    while _is_asked_by(gateway, "bob", big):  # until the probe has ended
        assert len(big.completions) < 50


def _is_asked_by(gateway: Gateway, who: str, upstream: Upstream) -> bool:
    asked = len(upstream.completions)
    assert answering(gateway, who) == "small"
    return len(upstream.completions) > asked
