"""What a call costs: expected before it goes out, at most, and charged once it has ended.

A caller may hang up before the upstream reports its usage, and some upstreams report none. Such a call is charged the
larger of what was reserved for it and an estimate from what was relayed, so that no budget is evaded.
"""

from __future__ import annotations

from typing import NamedTuple

from prefill_router.policy.pool import Target
from prefill_serve.gateway.call_record import CostKind, Usage
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.state.reservations import Exhausted
from prefill_serve.middleware.gate import Refusal

_BYTES_A_TOKEN = 3  # of text that was relayed; rather too many tokens than too few
_USUAL_TOKENS = 512  # of an answer whose length nobody has predicted
_USUAL_ANSWERS = 128  # the most that OpenAI takes as `n`


class Charge(NamedTuple):
    usd: float
    kind: CostKind


class OverLimit(Refusal):
    """A hard limit has no room for a call."""

    def __init__(self, found: Exhausted) -> None:
        until = f"{found.until:%Y-%m-%dT%H:%M:%SZ}"
        whose = "the hard limit of all keys together has no room"
        if found.key is not None:  # what others spend is nobody's business
            left_usd = max(found.left_usd, 0.0)
            whose = f'key "{found.key}": {left_usd:.6g} of its {found.limit_usd:.6g} USD a day are left'
        message = (
            f"{whose}, and this call can cost {found.call_usd:.6g} USD: set a lower limit of output tokens, or try "
            f"again after {until}"
        )
        super().__init__(429, message, "budget_exceeded", headers={"retry-after": str(found.retry_after_s)})


def charge_of(target: Target, usage: Usage | None, reserved_usd: float, input_tokens: int, text_bytes: int) -> Charge:
    """The reported cost; without a report, or with one of no tokens for some text, the larger of two guesses."""
    if usage is not None and (usage.output_tokens or not text_bytes):
        return Charge(target.cost(*usage), "reported")
    estimated_usd = target.cost(input_tokens, -(-text_bytes // _BYTES_A_TOKEN))
    return Charge(reserved_usd, "reserved") if reserved_usd >= estimated_usd else Charge(estimated_usd, "estimated")


def expected_usd(usd: float, call: Call) -> float:
    """The expected cost of all answers that a call asks for, where that of one is `usd`."""
    return usd * min(call.num_answers, _USUAL_ANSWERS)


def guessed_usd(target: Target, call: Call, input_tokens: int) -> float:
    """The expected cost where no router has predicted any."""
    length = min(call.stated_limit or _USUAL_TOKENS, _USUAL_TOKENS)
    return target.cost(input_tokens, min(call.num_answers, _USUAL_ANSWERS) * length)


def most_usd(target: Target, call: Call) -> float:
    """The most that a call can cost, whose answers have a limit: the caller's own or, without one, the gateway's."""
    input_tokens, length = call.most_input_tokens, call.stated_limit or call.answer_tokens or 0
    if target.context_tokens is not None:
        # What a conversation held before, that the upstream keeps, is unknown.
        input_tokens = target.context_tokens if call.continues else min(input_tokens, target.context_tokens)
        length = min(length, target.context_tokens)
    return target.cost(input_tokens, call.num_answers * length)
