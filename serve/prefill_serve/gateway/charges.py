"""The cost of a call: expected cost and upper bound before it is sent, charge once it has ended.

A caller may disconnect before the upstream reports its usage, and some upstreams report none. Such a call is charged
the larger of its reservation and an estimate from the relayed text, so that no budget can be evaded.
"""

from __future__ import annotations

from typing import NamedTuple

from prefill_router.common.money import usd
from prefill_router.common.usage import Usage
from prefill_router.policy.decision import Decision
from prefill_router.policy.pool import Target
from prefill_serve.gateway.call_record import CostKind
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.state.reservations import Exhausted
from prefill_serve.http_errors import Refusal

_BYTES_A_TOKEN = 3  # of relayed text; overestimates tokens
_USUAL_TOKENS = 512  # of an answer without a predicted length
_USUAL_ANSWERS = 128  # OpenAI's maximum of `n`


class Charge(NamedTuple):
    usd: float
    kind: CostKind


class OverLimit(Refusal):
    """A call would exceed a hard limit."""

    def __init__(self, found: Exhausted) -> None:
        until = f"{found.until:%Y-%m-%dT%H:%M:%SZ}"
        whose = "too little is left of the hard limit of all callers together"
        if found.key is not None:  # what other callers spend is not revealed
            left_usd = max(found.left_usd, 0.0)
            whose = f'caller "{found.key}" has {usd(left_usd)} of {usd(found.limit_usd)} a day left'
        message = (
            f"{whose}, and this call can cost {usd(found.call_usd)}: set a lower limit on output tokens, or retry "
            f"after {until}"
        )
        super().__init__(429, message, "budget_exceeded", headers={"retry-after": str(found.retry_after_s)})


def charge_of(
    target: Target, usage: Usage | None, reserved_usd: float, input_tokens: int, text_bytes: int, num_answers: int = 1
) -> Charge:
    """The reported cost; if no usage, or no output tokens for some text, is reported, the larger of two estimates."""
    if usage is not None and (usage.output_tokens or not text_bytes):
        return Charge(target.cost(*usage, num_answers=num_answers), "reported")
    estimated_usd = target.cost(input_tokens, -(-text_bytes // _BYTES_A_TOKEN), num_answers=num_answers)
    return Charge(reserved_usd, "reserved") if reserved_usd >= estimated_usd else Charge(estimated_usd, "estimated")


def expected_usd(target: Target, decision: Decision, call: Call) -> float:
    """The expected cost of all answers that a call requests, which share its input."""
    num_answers, length = usual_answers(call), decision.expected_output_tokens[target.name]
    one_usd = target.cost(decision.input_tokens, length)
    all_usd = target.cost(decision.input_tokens, num_answers * length, num_answers=num_answers)
    return decision.expected_cost_usd[target.name] + (all_usd - one_usd)


def usual_answers(call: Call) -> int:
    """The number of answers that a call requests, as far as upstreams give them."""
    return min(call.num_answers, _USUAL_ANSWERS)


def guessed_usd(target: Target, call: Call, input_tokens: int) -> float:
    """A guess of the expected cost for calls without a prediction."""
    length = min(call.stated_limit or _USUAL_TOKENS, _USUAL_TOKENS)
    num_answers = usual_answers(call)
    return target.cost(input_tokens, num_answers * length, num_answers=num_answers)


def most_usd(target: Target, call: Call) -> float:
    """The maximum cost of a call whose answers have a limit, the caller's or the gateway's."""
    length = call.stated_limit or call.answer_tokens or 0
    if target.upstream is None:
        input_tokens = call.most_input_tokens()
    else:
        input_tokens = call.most_input_tokens(target.upstream.max_image_tokens) + target.upstream.max_added_tokens
    if target.context_tokens is not None:
        # The length of a conversation stored by the upstream is unknown.
        input_tokens = target.context_tokens if call.continues else min(input_tokens, target.context_tokens)
        length = min(length, target.context_tokens)
    return target.most_cost(input_tokens, call.num_answers * length, call.num_answers)
