"""One try of a call at one upstream."""

from __future__ import annotations

from dataclasses import dataclass

from prefill_router.common.usage import Usage
from prefill_router.policy.answer_times import MeasuredTimes
from prefill_router.policy.pool import Target
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.translated_calls import TranslatedCall


@dataclass
class Attempt:
    """One try of a call at one upstream."""

    call: Call
    caller: str = ""
    is_billable: bool = False  # the upstream received it and did not reject it
    translation: TranslatedCall | None = None  # of which `call` is the upstream's side; None: the caller's own call
    target: Target | None = None  # without the fields that its model refuses [the channel's]
    usage: Usage | None = None  # of a whole answer, as the upstream reported it
    sent_s: float = 0.0  # by time.monotonic
    measured: MeasuredTimes | None = None  # once answered in one piece
