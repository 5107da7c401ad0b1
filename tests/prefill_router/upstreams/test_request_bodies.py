"""Bodies as targets' upstreams expect them."""

from __future__ import annotations

from typing import Any

import pytest

from prefill_router.policy.pool import Target, Upstream
from prefill_router.upstreams.request_bodies import request_body

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
CHAT: dict[str, Any] = {"model": "auto", "messages": [HELLO], "temperature": 0.2, "max_tokens": 9}


def made(body: dict[str, Any], **settings: Any) -> dict[str, Any]:
    upstream = Upstream(base_url="http://127.0.0.1/v1", **settings)
    return request_body(Target(name="t", input_price=1.0, output_price=1.0, upstream=upstream), body)


def test_without_settings_the_model_alone_is_replaced() -> None:
    assert made(CHAT) == {**CHAT, "model": "t"}
    assert made(CHAT, model="vendor/t") == {**CHAT, "model": "vendor/t"}


def test_fields_of_the_target_replace_the_callers() -> None:
    body = {**CHAT, "reasoning_effort": "low", "service_tier": "auto"}
    assert made(body, extra_body={"reasoning_effort": "high"}) == {**body, "model": "t", "reasoning_effort": "high"}


def test_objects_are_merged() -> None:
    given = {"thinking": {"type": "enabled", "budget": {"tokens": 1, "kind": "soft"}}}
    extra = {"thinking": {"budget": {"tokens": 2}, "display": None}}
    expected = {"type": "enabled", "budget": {"tokens": 2, "kind": "soft"}, "display": None}
    assert made({**CHAT, **given}, extra_body=extra)["thinking"] == expected
    assert made({**CHAT, "thinking": "on"}, extra_body=extra)["thinking"] == extra["thinking"]
    assert given["thinking"]["budget"] == {"tokens": 1, "kind": "soft"}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"reasoning_effort": "high"}, {"summary": "auto", "effort": "high"}),
        ({"reasoning_effort": "high", "reasoning": {"summary": "concise"}}, {"summary": "concise", "effort": "high"}),
        ({"reasoning": {"effort": "low"}}, {"summary": "auto", "effort": "low"}),
    ],
)
def test_the_effort_has_another_name_in_the_responses_api(extra: Any, expected: dict[str, str]) -> None:
    body = made({"input": "hello", "reasoning": {"summary": "auto", "effort": "medium"}}, extra_body=extra)
    assert body == {"model": "t", "input": "hello", "reasoning": expected}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HELLO], [{"role": "system", "content": "Be brief."}, HELLO]),
        (
            [{"role": "system", "content": "Be kind.", "name": "x"}, HELLO],
            [{"role": "system", "content": "Be brief.\n\nBe kind.", "name": "x"}, HELLO],
        ),
        (
            [{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}, HELLO],
            [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
                },
                HELLO,
            ],
        ),
        (
            [{"role": "system", "content": None}],
            [{"role": "system", "content": "Be brief."}, {"role": "system", "content": None}],
        ),
        ("hello", "hello"),
    ],
)
def test_a_prefix_precedes_the_system_message(messages: Any, expected: Any) -> None:
    assert made({"messages": messages}, system_prefix="Be brief.")["messages"] == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "Be brief."), ({"instructions": "Be kind."}, "Be brief.\n\nBe kind.")]
)
def test_a_prefix_precedes_the_instructions_of_a_response(given: dict[str, str], expected: str) -> None:
    body = made({"input": "hello", **given}, system_prefix="Be brief.")
    assert body == {"model": "t", "input": "hello", "instructions": expected}


def test_fields_are_dropped_and_renamed_before_the_targets_own_are_set() -> None:
    settings = {
        "drop": ["temperature", "absent"],
        "rename": {"max_tokens": "max_completion_tokens"},
        "extra_body": {"temperature": 1},
    }
    expected = {"model": "t", "messages": [HELLO], "max_completion_tokens": 9, "temperature": 1}
    assert made(CHAT, **settings) == expected
    assert made({**CHAT, "max_completion_tokens": 7}, **settings) == {**expected, "max_completion_tokens": 7}


def test_settings_add_no_more_tokens_than_their_bound() -> None:
    upstream = Upstream(base_url="http://127.0.0.1/v1", system_prefix="naïve", extra_body={"tools": ["é"]})
    assert upstream.max_added_tokens >= len("naïve".encode()) + len('{"tools":["é"]}'.encode())
    assert Upstream(base_url="http://127.0.0.1/v1").max_added_tokens == 0
