"""Plans: the order in which a call tries targets, by the router's decision or fixed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prefill_router.policy.decision import Decision, KnownPrefix, Policy
from prefill_router.policy.pool import Target
from prefill_router.policy.switching import SwitchRule
from prefill_serve.endpoint import Routing
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.responses_calls import ResponsesCall

_CHARACTERS_A_TOKEN = 3  # for text that was not tokenized; overestimates tokens


class Candidate(NamedTuple):
    """A target, with the router's decision if there is one, and why its conversation stayed or moved."""

    target: str
    decision: Decision | None
    why: str | None = None


@dataclass(frozen=True)
class RoutedPlan:
    """A plan by the router's decision, which keeps a conversation's target unless a move is worth it."""

    routing: Routing
    policy: Policy
    sticky: str | None
    rule: SwitchRule
    known: KnownPrefix | None = None
    is_amid_tools: bool = False  # the call carries results of tools, which the conversation's target asked for

    @property
    def input_tokens(self) -> int:
        return self.routing.reading.input_tokens

    def over_budget(self, tolerance: float | None) -> RoutedPlan:
        """Over-budget variant: uses the budget's tolerance and drops the conversation's target, except amid tools."""
        policy = replace(self.policy, tolerance=1.0 if tolerance is None else tolerance)
        return replace(self, policy=policy, sticky=self.sticky if self.is_amid_tools else None)

    def choose(self, among: Collection[str]) -> Candidate | None:
        """Chooses one of these targets; None if none meets the constraints."""
        allowed = [name for name in among if self.policy.allowed is None or name in self.policy.allowed]
        if not allowed:
            return None
        if self.sticky is None:
            return self._decide(allowed, explores=True)
        kept = self._decide([self.sticky]) if self.sticky in allowed else None
        if kept is not None and self.is_amid_tools:
            return kept._replace(why="kept: the call carries results of tools")
        chosen = self._decide(allowed, explores=kept is None)
        if chosen is None:
            return None
        if kept is None:
            return chosen._replace(why=f"moved: {self.sticky} cannot be asked for this call")
        assert chosen.decision is not None
        moves, why = self.rule.judge(kept.target, chosen.decision)
        return chosen._replace(why=f"moved: {why}") if moves else kept._replace(why=f"kept: {why}")

    def _decide(self, allowed: Sequence[str], *, explores: bool = False) -> Candidate | None:
        policy = replace(self.policy, allowed=list(allowed))
        decision = self.routing.decide(policy, explores=explores, known=self.known)
        return None if decision.target is None else Candidate(decision.target, decision)


@dataclass(frozen=True)
class FixedPlan:
    """A plan with a fixed order: the caller's target, the conversation's, or the defaults if routing failed."""

    order: Sequence[str]
    input_tokens: int
    sticky: str | None = None
    why: str | None = None  # the conversation stays

    def choose(self, among: Collection[str]) -> Candidate | None:
        return next((Candidate(name, None, self.why) for name in self.order if name in among), None)


Plan = RoutedPlan | FixedPlan


def default_order(targets: Sequence[Target], default: str | None, allowed: Sequence[str] | None) -> list[str]:
    """The default target first, then the others by ascending price of 1,000 tokens of input and output each."""
    by_price = sorted(targets, key=lambda target: target.cost(1000, 1000))
    names = [target.name for target in by_price if allowed is None or target.name in allowed]
    return sorted(names, key=lambda name: name != default)


def can_take(target: Target, call: Call, input_tokens: int) -> bool:
    """Whether the target supports what the call needs."""
    needs = call.needs
    return (
        target.upstream is not None
        and (target.upstream.responses or not isinstance(call, ResponsesCall))
        and (target.tools or not needs.tools)
        and (target.images or not needs.images)
        and (target.context_tokens is None or input_tokens + needs.output_tokens <= target.context_tokens)
    )


def estimated_tokens(call: Call) -> int:
    """Estimates the tokens of a call that was not tokenized, without images."""
    return sum(_num_characters(message.get("content")) for message in call.messages) // _CHARACTERS_A_TOKEN


def _num_characters(content: Any) -> int:
    if isinstance(content, list):
        return sum(_num_characters(part.get("text")) for part in content if isinstance(part, dict))
    return len(content) if isinstance(content, str) else 0
