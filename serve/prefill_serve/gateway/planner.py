"""Plans a call: which targets may take it, by the router, the conversation or the caller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from prefill_router.common.errors import UserError
from prefill_router.policy.decision import KnownPrefix
from prefill_router.policy.switching import SwitchRule
from prefill_serve.endpoint import Endpoint, UnknownTarget
from prefill_serve.gateway.active_call import Caller
from prefill_serve.gateway.candidates import FixedPlan, Plan, RoutedPlan, default_order, estimated_tokens
from prefill_serve.gateway.conversation_keys import Thread, answer_key, has_sealed_reasoning, thread_of
from prefill_serve.gateway.gateway_metrics import GatewayMetrics
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.responses_calls import ResponsesCall
from prefill_serve.gateway.state.call_ledger import CallLedger
from prefill_serve.gateway.state.conversations import Past
from prefill_serve.gateway.upstream import Channel
from prefill_serve.settings import GatewaySettings

log = logging.getLogger("ray.serve")

LEDGER_S = 0.25  # limit for ledger requests that a call can do without
_T = TypeVar("_T")


class NoUpstream(UserError):  # noqa: N818 - an answer, not a fault
    """No target of the pool has an upstream, or one of the call's kind."""


class UnknownAnswer(UserError):  # noqa: N818 - an answer, not a fault
    """A call continues an answer that the ledger does not know as this caller's."""


class Planner:
    """Plans calls with the loaded router and the ledger's conversations."""

    def __init__(self, endpoint: Endpoint, ledger: CallLedger, metrics: GatewayMetrics) -> None:
        self.endpoint, self.ledger, self.metrics = endpoint, ledger, metrics

    @property
    def settings(self) -> GatewaySettings:
        return self.endpoint.now.settings.gateway or GatewaySettings()

    async def plan(self, call: Call, caller: Caller, channels: dict[str, Channel]) -> tuple[Plan, Thread | None]:
        require_upstream(call, channels)
        await self._require_own_answer(call, caller)
        if call.pinned is not None:
            return FixedPlan([call.pinned], estimated_tokens(call)), None
        thread = thread_of(call, caller.name, caller.session)
        past = asyncio.create_task(self._past(thread))
        return await self._routed(call, caller, past, channels), thread

    async def _require_own_answer(self, call: Call, caller: Caller) -> None:
        """Raises UnknownAnswer for a call that continues an unknown answer or another caller's.

        An upstream stores the answers to all callers under one key, and would continue any of them. Without keys there
        is one caller, so the upstream may be asked.
        """
        if call.continues is None or self.endpoint.now.settings.open:
            return
        if await self.ledger.target_of_answer(answer_key(caller.name, call.continues)) is None:
            given = f'previous_response_id "{call.continues}"'
            raise UnknownAnswer(f"{given}: not found, or too old: send the conversation as input")

    async def _routed(
        self, call: Call, caller: Caller, past: asyncio.Task[Past | None], channels: dict[str, Channel]
    ) -> Plan:
        settings = self.settings
        allowed = call.allowed
        if call.continues is not None or has_sealed_reasoning(call.messages):
            latest = await past
            if latest is not None:
                does = "can read its reasoning" if call.continues is None else "stores the answer before"
                why = f"kept: no other target {does}"
                return FixedPlan([latest.target], estimated_tokens(call), latest.target, why)
        try:
            async with asyncio.timeout(settings.route_timeout_s):
                routing = await self.endpoint.read(call.question, settings.route_timeout_s, caller.name)
        except UnknownTarget:
            raise
        except Exception as error:  # the default target can still answer
            return self._unrouted(call, caller, allowed, error, await past)
        rule = SwitchRule(settings.stick_margin, settings.quality_usd)
        latest = await past
        if latest is None:
            return RoutedPlan(routing, routing.policy, None, rule)
        channel = channels.get(latest.target)
        life_s = 0.0 if channel is None else channel.target.cache_life_s
        known = known_prefix(latest, routing.reading.input_tokens, life_s)
        return RoutedPlan(routing, routing.policy, latest.target, rule, known, call.carries_results)

    def _unrouted(
        self, call: Call, caller: Caller, allowed: list[str] | None, error: Exception, latest: Past | None
    ) -> FixedPlan:
        """The plan without the router: the target that called tools, or the default one, first."""
        reason = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        self.metrics.defaults.inc(1, tags={"reason": reason})
        log.warning("routing failed", extra={"route_id": caller.request_id, "reason": str(error) or reason})
        targets = self.endpoint.now.primary.router.pool.targets
        first = latest.target if latest is not None and call.carries_results else self.settings.default_target
        order = default_order(targets, first, allowed)
        return FixedPlan(order, estimated_tokens(call))

    async def _past(self, thread: Thread) -> Past | None:
        """What is known of a conversation; None if it is new or the ledger takes too long."""
        if not thread.earlier and thread.main is None:
            return None
        return await answer_in_time(self.ledger.past(thread.earlier, thread.main))


def known_prefix(past: Past, counted_tokens: int, life_s: float) -> KnownPrefix:
    """What the last call of a conversation tells about the next one, of `counted_tokens` by the encoder.

    The prefix is not cached if it was unused for longer than `life_s`, or if the history has become shorter.
    """
    is_cached = past.age_s <= life_s and counted_tokens >= past.counted_tokens
    uncounted_tokens = max(past.input_tokens - past.counted_tokens, 0)
    return KnownPrefix(past.target, past.input_tokens if is_cached else 0, uncounted_tokens)


def require_upstream(call: Call, channels: dict[str, Channel]) -> None:
    """Raises NoUpstream if no target has one for this kind of call, UnknownTarget if the named one has none."""
    if not channels:
        raise NoUpstream("this endpoint only routes: to answer calls, set a pool whose targets have upstreams")
    if call.pinned is not None and call.pinned not in channels:
        raise UnknownTarget(f'model "{call.pinned}": must be "auto", or one of {", ".join(channels)}')
    asked = channels.values() if call.pinned is None else [channels[call.pinned]]
    if isinstance(call, ResponsesCall) and not any(channel.upstream.responses for channel in asked):
        whose = "no target here has" if call.pinned is None else f'model "{call.pinned}" lacks'
        remedy = "call /v1/chat/completions, or set responses = true for an upstream that has it"
        raise NoUpstream(f"{whose} the Responses API: {remedy}")


async def answer_in_time(answer: Awaitable[_T], patience_s: float | None = None) -> _T | None:
    """The ledger's answer; None if it fails or takes too long."""
    try:
        async with asyncio.timeout(patience_s or LEDGER_S):
            return await answer
    except Exception:
        log.warning("ledger unavailable", exc_info=True)
        return None
