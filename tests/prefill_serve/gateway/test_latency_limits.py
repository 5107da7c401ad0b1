"""Limits on the time of answers: what the gateway learns of its targets, and how calls and routes use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gateway import Gateway, gateway_of_two
from prefill_router.policy.answer_times import AnswerTimes, MeasuredTimes
from upstream import Upstream

ASKED = "what is one plus two"


@pytest.fixture(scope="module")
def served(router: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, Upstream]]]:
    folder = tmp_path_factory.mktemp("latency")
    settings = {"gateway": {"ledger": {"folder": str(folder / "kept")}}}
    with gateway_of_two(router, folder, **settings) as served:
        yield served


@pytest.fixture
def gateway(served: tuple[Gateway, dict[str, Upstream]]) -> Gateway:
    """A gateway that knows no times."""
    gateway, upstreams = served
    gateway.endpoint.times = AnswerTimes()
    gateway.configure(max_latency_s=None)
    for upstream in upstreams.values():
        upstream.calls.clear()
    return gateway


def learn(gateway: Gateway, **seconds: float) -> None:
    """Lets targets have answered before: a token a millisecond after the first one."""
    for target, first_s in seconds.items():
        for _ in range(5):
            gateway.endpoint.times.of(target).add(10, 100, MeasuredTimes(first_s, first_s + 0.1))


def route(gateway: Gateway, **fields: Any) -> Any:
    return gateway.post("/v1/route", {"prompt": ASKED, "explain": True, **fields}).json()


def test_times_are_learnt_from_streams_and_told(gateway: Gateway, tmp_path: Path) -> None:
    assert "expected_s" not in route(gateway)
    ids = [gateway.chat(ASKED, model="big", stream=True).headers["x-request-id"] for _ in range(6)]
    answer = route(gateway)
    assert set(answer["expected_s"]) == set(answer["expected_first_token_s"]) == {"big"}
    assert 0.0 < answer["expected_first_token_s"]["big"] <= answer["expected_s"]["big"]
    target = gateway.stats()["targets"]["big"]
    assert target["first_token_s"] > 0.0
    assert "tokens_per_s" in target  # None if all came at once
    gateway.post("/v1/feedback", {"request_id": ids[-1], "correct": True}).raise_for_status()
    folder = gateway.settings.gateway.ledger.folder  # type: ignore[union-attr]
    (row,) = pq.read_table(Path(folder or "") / "outcomes").to_pylist()
    assert 0.0 < row["first_token_s"] <= row["latency_s"]


def test_times_are_learnt_from_whole_answers(gateway: Gateway) -> None:
    for _ in range(5):
        gateway.chat(ASKED, model="small")
    answer = route(gateway)
    assert set(answer["expected_s"]) == {"small"}
    assert "expected_first_token_s" not in answer


def test_a_limit_excludes_targets_that_are_known_to_be_slower(gateway: Gateway) -> None:
    usual = route(gateway)["selected_model"]
    other = {"big": "small", "small": "big"}[usual]
    learn(gateway, **{usual: 30.0})
    limited = route(gateway, max_latency_s=10.0)
    assert limited["selected_model"] == other  # whose times are unknown
    assert limited["explanation"][usual].startswith("expected to take 30")
    assert limited["explanation"][usual].endswith("above the limit, 10 s")
    assert route(gateway, max_latency_s=100.0)["selected_model"] == usual


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_call_goes_to_a_target_in_time_and_the_limit_stays_here(
    gateway: Gateway, served: tuple[Gateway, dict[str, Upstream]], path: str
) -> None:
    usual = route(gateway)["selected_model"]
    other = {"big": "small", "small": "big"}[usual]
    learn(gateway, **{usual: 30.0})
    said = [{"role": "user", "content": ASKED}]
    answer = gateway.post(path, {"messages" if "chat" in path else "input": said, "max_latency_s": 10.0})
    assert answer.headers["x-router-selected-model"] == other
    assert "max_latency_s" not in served[1][other].completions[-1].body


def test_no_target_in_time_is_409_as_for_other_constraints(gateway: Gateway) -> None:
    learn(gateway, big=30.0, small=20.0)
    said = {"messages": [{"role": "user", "content": ASKED}], "max_latency_s": 10.0}
    for path in ("/v1/route", "/v1/chat/completions"):
        answer = gateway.post(path, said)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_target")
        assert "raise max_cost_usd or max_latency_s" in answer.json()["error"]["message"]


def test_a_setting_is_the_limit_of_requests_that_state_none(gateway: Gateway) -> None:
    usual = route(gateway)["selected_model"]
    learn(gateway, **{usual: 30.0})
    gateway.configure(max_latency_s=10.0)
    assert route(gateway)["selected_model"] != usual
    assert route(gateway, max_latency_s=100.0)["selected_model"] == usual


def test_a_misspelt_or_senseless_limit_is_named(gateway: Gateway) -> None:
    for fields, said in (
        ({"max_latency": 1}, 'did you mean "max_latency_s"?'),
        ({"max_latency_s": 0}, "max_latency_s"),
    ):
        answer = gateway.post("/v1/route", {"prompt": ASKED, **fields})
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
