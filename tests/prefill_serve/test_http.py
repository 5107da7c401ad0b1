from __future__ import annotations

import pytest
from pydantic import ValidationError

from prefill_router.errors import UserError
from prefill_serve.http import RouteRequest


def test_a_bare_prompt_and_messages_become_the_cores_prompts() -> None:
    assert RouteRequest(prompt="hello").to_prompt() == "hello"
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
    assert RouteRequest.model_validate({"messages": messages}).to_prompt() == messages


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}])
def test_exactly_one_of_prompt_and_messages_is_wanted(body: dict[str, object]) -> None:
    with pytest.raises(UserError, match="either prompt or messages"):
        RouteRequest.model_validate(body).to_prompt()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "boss", "content": "hello"}, r'request: messages\[0\]\.role = "boss", must be one of system, '),
        ({"role": "user", "content": " "}, "must hold more than white space"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(message: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        RouteRequest.model_validate({"messages": [message]}).to_prompt()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": 3},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"prompt": "a", "tolerance": -0.1},
        {"prompt": "a", "max_cost_usd": float("nan")},
        {"prompt": "a", "toleranze": 0.1},
    ],
)
def test_bad_bodies_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RouteRequest.model_validate(body)
