"""Refusals in the words of providers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefill_serve.gateway.refusals import RefusalReason, is_refused_everywhere, refusal_reason
from prefill_serve.gateway.upstream_errors import error_answer, error_message
from provider_refusals import OF_THE_OPERATOR, REFUSALS, ProviderRefusal


def label(given: ProviderRefusal) -> str:
    return f"{given.provider}-{'-'.join(map(str, given.about))}"


def reason_of(given: ProviderRefusal) -> RefusalReason | None:
    return refusal_reason(given.status, error_answer(json.dumps(given.body).encode()))


@pytest.mark.parametrize("given", REFUSALS, ids=label)
def test_a_refusal_is_classified_in_any_providers_words(given: ProviderRefusal) -> None:
    reason = reason_of(given)
    assert reason is not None
    assert reason[:3] == (*given.about, None, None)[:3]


@pytest.mark.parametrize("given", OF_THE_OPERATOR, ids=label)
def test_an_error_of_the_operators_account_is_no_refusal(given: ProviderRefusal) -> None:
    assert reason_of(given) is None


def test_there_are_enough_refusals_of_enough_providers() -> None:
    assert len(REFUSALS) >= 40
    assert len({given.provider for given in REFUSALS}) >= 10


@pytest.mark.parametrize("message", ["'temperature' does not support 0.2", "'temperature' may only be set to 1"])
def test_a_value_that_is_refused_says_nothing_of_other_values(message: str) -> None:
    error = {"message": f"Unsupported value: {message}" if "support" in message else message}
    assert refusal_reason(400, {"error": error}) == RefusalReason("parameter", "temperature", is_about_value=True)


@pytest.mark.parametrize(
    "said", ["Unsupported parameter: 'reasoning.effort' is", "Unsupported value: 'reasoning.summary' does"]
)
def test_the_effort_is_a_part_of_the_reasoning(said: str) -> None:
    reason = refusal_reason(400, {"error": {"message": f"{said} not support 'low' with this model."}})
    assert reason is not None
    assert reason[:2] == ("parameter", "reasoning")


@pytest.mark.parametrize(
    "message",
    [
        "Invalid value: 'Unsupported parameter: 'temperature' is not supported'",
        "messages.0.content: temperature: Extra inputs are not permitted",
        "Tool 'seed is unsupported' is invalid",
        "Invalid JSON payload received. Unknown name \"seed\" at 'tools[0]': Cannot find field.",
        "Additional properties are not allowed ('seed' was unexpected) - 'messages.0'",
        "tools.0.seed: Extra inputs are not permitted",
        "Unknown parameter: 'tools[0].seed'.",
        "Invalid value: '' does not support tools ''",
        "Invalid value: 'image input modality is not enabled for'",
    ],
)
def test_text_of_the_caller_within_a_message_names_no_field(message: str) -> None:
    reason = refusal_reason(400, {"error": {"message": message}})
    assert reason is not None
    assert (reason.kind != "parameter", reason.name) == (True, None)


@pytest.mark.parametrize(
    "body", [{}, {"error": None}, {"error": [1]}, {"error": {"message": 7, "metadata": {"raw": 1}}}]
)
def test_an_error_without_words_is_about_the_request(body: Any) -> None:
    assert refusal_reason(400, body) == RefusalReason("request")
    assert refusal_reason(413, body) == RefusalReason("too_long")
    assert refusal_reason(500, body) is None


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_tokens", -1, True),
        ("max_tokens", 0, True),
        ("max_tokens", 10**9, False),  # another target may have room
        ("max_tokens", "many", False),  # lenient upstreams read numbers in text
        ("temperature", 2.5, True),
        ("temperature", 1.5, False),
        ("temperature", float("nan"), True),
        ("top_p", -0.1, True),
        ("n", 0, True),
        ("seed", -1, False),
    ],
)
def test_a_value_that_no_api_accepts_is_refused_everywhere(field: str, value: Any, expected: bool) -> None:
    assert is_refused_everywhere(RefusalReason("request", field), {field: value}) is expected
    assert not is_refused_everywhere(RefusalReason("request"), {field: value})
    assert not is_refused_everywhere(RefusalReason("request", field), {})


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"[1]", b"[{}, {}]", b"[" * 100_000, b"7"])
def test_a_body_that_is_no_error_has_no_fields(content: bytes) -> None:
    assert error_answer(content) == {}


def test_the_message_of_a_validator_is_found() -> None:
    body = {"message": {"detail": [{"loc": ["body", "n"], "msg": "Field required"}]}}
    assert error_message(body) == "Field required"
