"""Expected cost, maximum cost and charge of a call."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from prefill_router.common.usage import Usage
from prefill_router.policy.decision import Decision
from prefill_router.policy.pool import Target, Upstream
from prefill_router.policy.token_prices import PriceTier
from prefill_serve.gateway.charges import (
    Charge,
    OverLimit,
    charge_of,
    expected_usd,
    guessed_usd,
    most_usd,
    usual_answers,
)
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.responses_calls import ResponsesCall
from prefill_serve.gateway.state.reservations import Exhausted

TARGET = Target(name="t", input_price=1e6, output_price=1e6)  # a dollar a token
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 300_000}}


def chat(content: Any = "hello", **fields: Any) -> ChatCall:
    return ChatCall({"messages": [{"role": "user", "content": content}], **fields}, answer_tokens=1000)


@pytest.mark.parametrize(
    ("usage", "reserved_usd", "text_bytes", "charge"),
    [
        (Usage(3, 4), 100.0, 1000, Charge(7.0, "reported")),
        (Usage(3, 0), 100.0, 0, Charge(3.0, "reported")),
        (Usage(3, 0), 100.0, 1, Charge(100.0, "reserved")),
        (None, 100.0, 30, Charge(100.0, "reserved")),
        (None, 0.0, 0, Charge(5.0, "estimated")),
        (None, 100.0, 300, Charge(105.0, "estimated")),
        (None, 0.0, 4, Charge(7.0, "estimated")),
    ],
)
def test_a_charge_is_what_is_reported_or_the_larger_of_what_was_reserved_and_relayed(
    usage: Usage | None, reserved_usd: float, text_bytes: int, charge: Charge
) -> None:
    assert charge_of(TARGET, usage, reserved_usd, 5, text_bytes) == charge


@pytest.mark.parametrize(("n", "answers"), [(None, 1), (1, 1), (3, 3), ("3", 3), (-1, 1), (10**9, 128), ([], 1)])
def test_several_answers_are_expected_to_cost_one_input_and_several_outputs(n: Any, answers: int) -> None:
    decision = Decision("t", {"t": 0.5}, {"t": 6.0}, {"t": 13.0}, 7, False, "v")
    assert expected_usd(TARGET, decision, chat(n=n)) == 7 + 6 * answers
    each = TARGET.model_copy(update={"usd_per_answer": 3.0})
    assert charge_of(each, Usage(7, 6), 0.0, 7, 0, usual_answers(chat(n=n))).usd == 13 + 3 * answers
    assert guessed_usd(TARGET, chat(n=n, max_tokens=10), 7) == 7 + 10 * answers
    assert guessed_usd(TARGET, chat(n=n), 7) == 7 + 512 * answers


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 1000),
        ({"max_tokens": 10}, 10),
        ({"max_tokens": "10"}, 10),
        ({"max_tokens": 10.0}, 10),
        ({"max_tokens": 10, "max_completion_tokens": 20}, 20),
        ({"max_tokens": 0}, 1000),
        ({"max_tokens": -5}, 1000),
        ({"max_tokens": float("nan")}, 1000),
        ({"max_tokens": float("inf")}, 1000),
        ({"max_tokens": {"many": 1}}, 1000),
        ({"max_tokens": 10**400}, 10**8),
        ({"max_tokens": 10, "n": 1000}, 10_000),
        ({"max_tokens": 10, "n": "1000"}, 10_000),
    ],
)
def test_the_most_that_a_call_can_cost_is_by_its_bytes_and_the_limit_of_its_answers(
    fields: dict[str, Any], tokens: int
) -> None:
    call = chat(**fields)
    assert most_usd(TARGET, call) == call.most_input_tokens() + tokens


@pytest.mark.parametrize("text", ["a a a a", "7" * 100, "\U0001f600" * 10, "\ud800", "\u4e09"])
def test_no_text_has_more_tokens_than_are_counted(text: str) -> None:
    assert chat(text).most_input_tokens() >= len(text.encode("utf-8", "surrogatepass"))
    tools = [{"type": "function", "function": {"name": "f", "description": text}}]
    assert chat(tools=tools).most_input_tokens() >= len(text.encode("utf-8", "surrogatepass"))


def test_an_image_is_not_counted_by_its_bytes_but_text_that_looks_like_one_is() -> None:
    assert chat([IMAGE]).most_input_tokens() < 3000
    assert chat([IMAGE, IMAGE]).most_input_tokens() > 4000
    assert chat(IMAGE["image_url"]["url"]).most_input_tokens() > 300_000  # type: ignore[index]


def test_a_context_bounds_what_a_call_can_cost() -> None:
    target = TARGET.model_copy(update={"context_tokens": 500})
    assert most_usd(target, chat("x" * 10_000)) == 1000
    assert most_usd(target, ResponsesCall({"input": "x", "max_output_tokens": 5, "previous_response_id": "r"})) == 505


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("ann", 'caller "ann" has $0.250 of $2.00 a day left, and this call can cost $0.500'),
        (None, "too little is left of the hard limit of all callers together, and this call can cost $0.500"),
    ],
)
def test_a_refusal_says_what_and_until_when(key: str | None, said: str) -> None:
    refusal = OverLimit(Exhausted(key, 2.0, 0.25, 0.5, datetime(2026, 3, 2, tzinfo=UTC), 77))
    assert refusal.status_code == 429
    assert refusal.body["error"]["message"].startswith(said)
    assert "2026-03-02T00:00:00Z" in refusal.body["error"]["message"]
    assert refusal.headers == {"retry-after": "77"}


def test_what_a_target_adds_to_a_call_is_part_of_the_most_it_can_cost() -> None:
    upstream = Upstream(base_url="http://127.0.0.1/v1", system_prefix="Be brief.")
    target = TARGET.model_copy(update={"upstream": upstream})
    assert most_usd(target, chat()) == most_usd(TARGET, chat()) + len("Be brief.")


def test_an_image_counts_at_most_what_its_target_says() -> None:
    """gpt-4o-mini counts up to 48,169 tokens for one."""
    upstream = Upstream(base_url="http://127.0.0.1/v1", max_image_tokens=48_200)
    call = chat([IMAGE, IMAGE])
    text = call.most_input_tokens(0)
    assert most_usd(TARGET.model_copy(update={"upstream": upstream}), call) - most_usd(TARGET, call) == 2 * 46_200
    assert call.most_input_tokens() == text + 4000


def test_the_most_that_a_call_can_cost_includes_a_cache_and_longer_inputs() -> None:
    call = chat("x" * 1000, n=2, max_tokens=10)
    length = call.most_input_tokens()
    writes = TARGET.model_copy(update={"cache_write_long_price": 2e6})
    assert most_usd(writes, call) == 2 * length + 20
    tier = PriceTier(above=length - 1, input_price=3e6, output_price=4e6)
    assert most_usd(TARGET.model_copy(update={"tiers": (tier,)}), call) == 3 * length + 4 * 20
    beyond = tier.model_copy(update={"above": length})
    assert most_usd(TARGET.model_copy(update={"tiers": (beyond,)}), call) == length + 20
