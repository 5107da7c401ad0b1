"""Attempts at calls of either protocol, against a server that fails on request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from prefill_router.collection.target_calls import Asked, TargetAnswer, TargetCall
from prefill_router.collection.target_client import Miss, ask
from prefill_router.policy.pool import Target
from prefill_router.policy.pool import Upstream as Way
from prefill_router.upstreams.transport import http_client
from upstream import Fault, Upstream

SAID: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "name a river ß"}]
PROTOCOLS = ["openai", "anthropic"]


@pytest.fixture(scope="module")
def small() -> Iterator[Upstream]:
    with Upstream("small") as upstream:
        yield upstream


def asked(upstream: Upstream, protocol: Any, prompt: Any = SAID, **fields: Any) -> TargetAnswer | Miss:
    way = Way(base_url=upstream.url, protocol=protocol)
    target = Target(name="t", input_price=1.0, output_price=1.0, upstream=way)

    async def scenario() -> TargetAnswer | Miss:
        async with http_client() as http:
            return await ask(TargetCall("p", prompt, target, Asked(max_output_tokens=50, **fields)), http)

    return asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_has_text_reason_and_usage(small: Upstream, protocol: str) -> None:
    answer = asked(small, protocol, temperature=0.5)
    assert isinstance(answer, TargetAnswer)
    assert (answer.text, answer.finish_reason) == ("small: name a river ß", "stop")
    assert (answer.input_tokens, answer.output_tokens) == (6, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_error_is_a_miss(small: Upstream, protocol: str) -> None:
    small.faults(Fault.OVERLOADED, Fault.NOT_FOUND, Fault.ERROR_FIRST)
    assert asked(small, protocol) == Miss("status 503", retry_after_s=1.0)
    missing = asked(small, protocol)
    assert isinstance(missing, Miss)
    assert missing.is_final
    assert asked(small, protocol) == Miss("answered 200 with an error", may_be_paid=True)


@pytest.mark.parametrize(
    ("prompt", "fields", "reason"),
    [
        (SAID, {"seed": 1}, "seed"),
        (SAID, {"temperature": 2.0}, "temperature: above 1"),
        ([*SAID, {"role": "system", "content": "later"}], {}, "messages[2]: a system message after the first turn"),
    ],
)
def test_what_the_protocol_cannot_ask_is_not_sent(small: Upstream, prompt: Any, fields: Any, reason: str) -> None:
    small.calls.clear()
    miss = asked(small, "anthropic", prompt, **fields)
    assert miss == Miss(f"the upstream's protocol cannot express {reason}", is_final=True)
    assert not small.calls
