"""A call in progress: its plan, its current target, and what it has reserved, tried and lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

from prefill_router.common.usage import Usage
from prefill_router.policy.answer_times import MeasuredTimes
from prefill_router.policy.pool import Target
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_serve.gateway.candidates import Candidate, Plan, RoutedPlan, can_take
from prefill_serve.gateway.charges import charge_of, expected_usd, guessed_usd, most_usd, usual_answers
from prefill_serve.gateway.conversation_keys import answer_key
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.refused_fields import is_adaptable, is_hint
from prefill_serve.gateway.state.call_ledger import Bid
from prefill_serve.gateway.state.conversations import Key, MainAgent
from prefill_serve.gateway.state.reservations import Exhausted, Reserved
from prefill_serve.gateway.translated_calls import TranslatedCall, translated
from prefill_serve.gateway.upstream import Channel
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_failures import UpstreamRefusal

_MOST_OF_A_HEADER = 500


class Caller(NamedTuple):
    """The caller's name, the request's id, and the caller's id of the session."""

    name: str
    request_id: str
    session: str | None = None


@dataclass
class ActiveCall:
    """A call in progress."""

    call: Call
    caller: Caller
    plan: Plan
    channels: dict[str, Channel]  # by target
    keys: list[Key]  # of its conversation
    main: MainAgent | None = None  # if the caller names the session
    choice: Candidate | None = None
    failed: list[str] = field(default_factory=list)
    refusal: tuple[UpstreamRefusal, Candidate | None] | None = None  # the first, and the choice that it was
    changed: set[tuple[str, str | None]] = field(default_factory=set)  # targets and fields, left out or renamed
    postponed: set[str] = field(default_factory=set)  # targets to ask without a hint only if no other answers
    left_out: list[str] = field(default_factory=list)  # of the call, for the current target
    ticket: str = field(default_factory=lambda: uuid4().hex)  # unlike the request id, unique
    reserving: list[asyncio.Future[Reserved | Exhausted]] = field(default_factory=list)
    reserved_usd: float = 0.0  # for the current target
    attempt: Attempt | None = None  # in progress
    usage: Usage | None = None  # of a whole answer
    measured: MeasuredTimes | None = None  # of a whole answer
    lost_usd: dict[str, float] = field(default_factory=dict)  # by target: billable attempts without an answer
    translations: dict[str, TranslatedCall | Untranslatable] = field(default_factory=dict)  # by protocol
    answer_key: Key | None = None  # finds the target that stores the answer, for the next call

    def keep_answer(self, answer_id: str | None) -> None:
        """Records the id under which the upstream stores the answer, if any."""
        if answer_id is not None:
            self.answer_key = answer_key(self.caller.name, answer_id)
            self.keys.append(self.answer_key)

    def translated_for(self, target: Target) -> TranslatedCall | Untranslatable:
        """The call in the protocol of a target's upstream, or why there is none."""
        assert target.upstream is not None
        protocol = target.upstream.protocol
        if protocol not in self.translations:
            try:
                self.translations[protocol] = translated(self.call, protocol)
            except Untranslatable as error:
                self.translations[protocol] = error
        return self.translations[protocol]

    def asked_of(self, target: Target) -> Call:
        """The call as a target that can be asked for it understands it."""
        asked = self.translated_for(target)
        assert isinstance(asked, TranslatedCall)
        return asked.call

    @property
    def excluded(self) -> list[str]:
        """The targets whose protocol cannot express the call, each with the field that prevents it."""
        found = {name: self.translated_for(channel.target) for name, channel in self.channels.items()}
        return [f"{name} ({reason})" for name, reason in found.items() if isinstance(reason, Untranslatable)]

    def choose(self, plan: Plan) -> Candidate | None:
        """The next target to try: of those that can take the call, preferably one that is ready."""
        able = [
            name
            for name, channel in self.channels.items()
            if name not in self.failed
            and can_take(channel.target, self.call, self.plan.input_tokens)
            and isinstance(self.translated_for(channel.target), TranslatedCall)
        ]
        ready = [name for name in able if self.channels[name].is_ready]
        best = [name for name in ready if name not in self.postponed]
        best = [name for name in best if not self._needs_refused(self.channels[name])]
        return plan.choose(best) or plan.choose(ready) or plan.choose(able)

    def begin(self, channel: Channel) -> Attempt:
        """Begins an attempt without the fields that the target refused; a call that names its target keeps them."""
        target, self.left_out = channel.target, []
        translation = self.translated_for(target)
        assert isinstance(translation, TranslatedCall)
        asked = translation.call
        if self.call.pinned is None:
            target, self.left_out = channel.refused.adapted(target, asked), channel.refused.left_out(asked)
        self.attempt = Attempt(asked, self.caller.name, target=target, translation=translation)
        return self.attempt

    def _needs_refused(self, channel: Channel) -> bool:
        return channel.refused.are_needed(self.asked_of(channel.target))

    def refuse(self, channel: Channel, refusal: UpstreamRefusal) -> None:
        """Notes a refusal. The target stays a candidate if it may answer without the field that it refused."""
        self.refusal = self.refusal or (refusal, self.choice)
        name, why = channel.target.name, refusal.why
        if self.call.pinned is not None or not is_adaptable(why) or (name, why.name) in self.changed:
            self.failed.append(name)
            return
        self.changed.add((name, why.name))
        if is_hint(why):
            self.postponed.add(name)

    def bid(self, choice: Candidate) -> Bid:
        """The call's expected cost at a target or, under a hard limit, the most it can cost."""
        target, call = self.channels[choice.target].target, self.call
        usd, least_usd = None, 0.0
        if call.answer_tokens is not None:
            least_usd = most_usd(target, call)
            usd = None if call.continues else least_usd  # the stored conversation's length is unknown
        elif choice.decision is not None:
            usd = expected_usd(target, choice.decision, call) - choice.decision.cached_usd.get(target.name, 0.0)
        else:
            least_usd = guessed_usd(target, call, self.plan.input_tokens)
        return Bid(choice.target, usd, least_usd, sum(self.lost_usd.values()))

    def lose(self) -> None:
        """Charges the current attempt, which ends without an answer, if its upstream may bill it."""
        if self.attempt is not None and self.attempt.is_billable and self.choice is not None:
            target = self.channels[self.choice.target].target
            answers = usual_answers(self.call)
            charge = charge_of(target, None, self.reserved_usd, self.plan.input_tokens, 0, answers)
            self.lost_usd[target.name] = charge.usd
        self.attempt = None

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that describe the decision."""
        choice = self.choice
        headers = {"x-router-excluded": _header(excluded)} if (excluded := self.excluded) else {}
        if choice is None:
            return headers
        headers["x-router-selected-model"] = _ascii(choice.target)
        if choice.why is not None:
            headers["x-router-conversation"] = _ascii(choice.why)
        asked = self.translated_for(self.channels[choice.target].target)
        if isinstance(asked, TranslatedCall) and asked.dropped:
            headers["x-router-dropped"] = _header(asked.dropped)
        if self.left_out:
            headers["x-router-left-out"] = ", ".join(self.left_out)
        if choice.decision is not None:
            headers["x-router-p-correct"] = f"{choice.decision.p_correct[choice.target]:.4f}"
            headers["x-router-version"] = choice.decision.router_version
            if isinstance(self.plan, RoutedPlan) and (missing := self.plan.routing.reading.missing):
                headers["x-router-missing-encoders"] = _ascii(",".join(missing))
        return headers


def _header(names: Sequence[str]) -> str:
    """A list as a header's value. Names may come from the caller: only visible ASCII is kept."""
    return re.sub(r"[^ -~]", "?", ", ".join(names))[:_MOST_OF_A_HEADER]


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
