"""Proxies a call: chooses a target, falls back to the next if its upstream fails, and relays the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any
from weakref import WeakValueDictionary

from starlette.responses import Response

from prefill_router.common.errors import UserError
from prefill_router.common.usage import Usage
from prefill_router.corpus.reader import Prompt, content_hash
from prefill_router.policy.answer_times import MeasuredTimes
from prefill_router.policy.decision import Decision
from prefill_router.policy.pool import Pool
from prefill_router.upstreams.transport import http_client
from prefill_serve.endpoint import CONSTRAINTS, Endpoint, NoTarget, Routing
from prefill_serve.gateway.active_call import ActiveCall, Caller
from prefill_serve.gateway.call_record import CallRecord, End
from prefill_serve.gateway.candidates import FixedPlan, RoutedPlan
from prefill_serve.gateway.charges import OverLimit, charge_of, expected_usd, usual_answers
from prefill_serve.gateway.gateway_metrics import GatewayMetrics
from prefill_serve.gateway.messages_calls import TokenCountCall
from prefill_serve.gateway.openai_calls import Body, Call
from prefill_serve.gateway.planner import Planner, answer_in_time, require_upstream
from prefill_serve.gateway.refusals import is_refused_everywhere
from prefill_serve.gateway.relay import Relay
from prefill_serve.gateway.state.call_ledger import Bid, CallLedger, LedgerUnavailable
from prefill_serve.gateway.state.reservations import LAPSES_S, Exhausted, Reserved
from prefill_serve.gateway.token_counts import count_tokens
from prefill_serve.gateway.upstream import Channel
from prefill_serve.gateway.upstream_failures import UpstreamFailure, UpstreamRefusal
from prefill_serve.gateway.upstream_stream import UpstreamStream
from prefill_serve.http_errors import Refusal
from prefill_serve.settings import Budgets

log = logging.getLogger("ray.serve")

_WAIT = (429, 503)
_RENEW_S = LAPSES_S / 4
_RECORD_AGAIN_S = (1, 2, 4, 8, 15, 30)  # waits for a ledger that is away
_CLOSE_S = 15.0  # for records under way
_HARD_LEDGER_S = 5.0  # a call under a hard limit needs the ledger's answer


class Proxy:
    """Answers calls with the loaded router. Bound to one event loop."""

    def __init__(self, endpoint: Endpoint, ledger: CallLedger) -> None:
        self.endpoint, self.ledger, self.metrics = endpoint, ledger, GatewayMetrics()
        self._planner = Planner(endpoint, ledger, self.metrics)
        self._http = http_client()
        self._channels: dict[str, Channel] = {}
        self._pool: Pool | None = None  # of these channels
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_progress: WeakValueDictionary[str, ActiveCall] = WeakValueDictionary()  # by ticket
        self._renewing: asyncio.Task[None] | None = None

    async def answer(self, call: Call, caller: Caller) -> Response:
        """Returns an upstream's answer, whole or as a stream.

        Raises UserError for a call that no target can take, Refusal if no upstream gave an answer.
        """
        started = perf_counter()
        hard = self._planner.settings.ledger.budgets.hard
        if hard.covers(caller.name):  # its maximum cost must be known in advance
            call = replace(call, answer_tokens=hard.answer_tokens)
        channels = self._current_channels()
        plan, thread = await self._planner.plan(call, caller, channels)
        active = ActiveCall(call, caller, plan, channels, [])
        if thread is not None:
            active.keys, active.main = [thread.own], thread.main
        try:
            answered = await self._ask(active)
        except (UpstreamRefusal, OverLimit) as refused:
            self._record(active, "refused")
            if isinstance(refused, OverLimit):
                raise
            refusal = call.refusal(refused.status, refused.content)
            return Response(refusal, refused.status, active.headers, "application/json")
        except (Refusal, LedgerUnavailable):
            self._record(active, "failed")
            raise
        except asyncio.CancelledError:
            self._record(active, "cancelled")
            raise
        self.metrics.first_seconds.observe(perf_counter() - started)
        assert active.choice is not None
        if isinstance(answered, UpstreamStream):
            headers = {**active.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
            return Relay(active, answered, headers, self._finish)
        active.keep_answer(call.answer_id(answered))
        usage = active.usage
        text_bytes = 0 if usage is not None and usage.output_tokens else call.answer_bytes(answered)
        self._record(active, "answered", active.choice.target, usage, text_bytes)
        content = json.dumps({**answered, "model": active.choice.target})
        return Response(content, 200, active.headers, "application/json")

    async def count_tokens(self, call: TokenCountCall, caller: Caller) -> Response:
        """Returns the input tokens of a message. Costs nothing and is not recorded."""
        channels = self._current_channels()
        require_upstream(call, channels)
        return await count_tokens(call, caller, channels, self.endpoint.now.engine)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
        await self._http.aclose()

    # --- request --------------------------------------------------------------------------------------------------

    def _current_channels(self) -> dict[str, Channel]:
        """Channels by target; a changed target gets a new one."""
        if self.endpoint.now.settings.gateway is None:
            return {}
        if (pool := self.endpoint.now.primary.router.pool) is self._pool:
            return self._channels
        self._pool, known = pool, self._channels
        self._channels = {
            target.name: known[target.name]
            if target.name in known and known[target.name].target == target
            else Channel(target, self._http)
            for target in pool.targets
            if target.upstream is not None
        }
        for name, channel in known.items():
            if self._channels.get(name) is not channel:
                self.metrics.breaker.forget({"target": name})
        return self._channels

    async def _ask(self, active: ActiveCall) -> Body | UpstreamStream:
        """Returns the answer of the first target that gives one."""
        failure: UpstreamFailure | None = None
        while (channel := await self._next(active)) is not None:
            try:
                attempt = active.begin(channel)
                answered = await (channel.stream(attempt) if active.call.is_stream else channel.answer(attempt))
                active.attempt, active.usage, active.measured = None, attempt.usage, attempt.measured
                return answered
            except UpstreamRefusal as refused:
                active.lose()
                self._learn(active, channel, refused)
                if is_refused_everywhere(refused.why, active.call.body):
                    failure = None  # a retry cannot help
                    break
            except UpstreamFailure as failed:
                active.lose()
                failure = failed
                active.failed.append(channel.target.name)
                self.metrics.failures.inc(1, tags={"target": channel.target.name, "reason": failed.reason})
                log.warning("upstream failed", extra=failed.for_log(active.caller.request_id))
            finally:
                self._set_breaker_metric(channel)
        if active.refusal is not None and (failure is None or not failure.may_pass):
            refusal, active.choice = active.refusal
            raise refusal
        if failure is None:
            message = f"no target can take this call: {CONSTRAINTS}"
            if active.excluded:
                message += f"; not translatable for {', '.join(active.excluded)}"
            raise NoTarget(message)
        after = {"retry-after": str(math.ceil(max(failure.retry_after_s, 1.0)))} if failure.status in _WAIT else {}
        raise Refusal(
            failure.status, f"no upstream answered; last failure: {failure}", "upstream_failed", headers=after
        )

    def _learn(self, active: ActiveCall, channel: Channel, refusal: UpstreamRefusal) -> None:
        """Notes a refusal, and logs a field that the target was not known to refuse."""
        active.refuse(channel, refusal)
        why, extra = refusal.why, refusal.for_log(active.caller.request_id)
        self.metrics.refusals.inc(1, tags={"target": channel.target.name, "kind": why.kind})
        log.info("upstream refused a call", extra=extra)
        if channel.refused.learn(why, active.asked_of(channel.target)):
            log.warning("upstream refuses a field", extra={**extra, "field": why.name, "instead": why.instead})

    async def _next(self, active: ActiveCall) -> Channel | None:
        """The channel of the next target to try. With budgets, reserves its expected cost.

        Raises OverLimit if a hard limit is exceeded, LedgerUnavailable if a hard limit cannot be checked.
        """
        self._start_probes(active.channels)
        plan, budgets = active.plan, self._planner.settings.ledger.budgets
        active.choice = active.choose(plan)
        if active.choice is not None and budgets != Budgets():
            over_budget = plan.over_budget(budgets.tolerance) if isinstance(plan, RoutedPlan) else plan
            ways = [(active.plan, active.choice), (over_budget, active.choose(over_budget) or active.choice)]
            reserved = await self._reserve(active, [active.bid(choice) for _, choice in ways])
            active.plan, active.choice = ways[reserved.bid]
            active.reserved_usd = reserved.usd
        elif active.choice is not None:
            bid = active.bid(active.choice)
            active.reserved_usd = max(bid.usd or 0.0, bid.least_usd)
        return None if active.choice is None else active.channels[active.choice.target]

    async def _reserve(self, active: ActiveCall, bids: list[Bid]) -> Reserved:
        """Reserves one of the bids; without the ledger the last, cheaper one, except under a hard limit."""
        is_hard = active.call.answer_tokens is not None
        reserving = asyncio.ensure_future(self.ledger.reserve(active.ticket, active.caller.name, bids))
        active.reserving.append(reserving)
        self._in_progress[active.ticket] = active
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        found = await answer_in_time(asyncio.shield(reserving), _HARD_LEDGER_S if is_hard else None)
        if isinstance(found, Exhausted):
            raise OverLimit(found)
        if found is None and is_hard:
            raise LedgerUnavailable("a hard limit cannot be checked without the ledger")
        return found or Reserved(len(bids) - 1, max(bids[-1].usd or 0.0, bids[-1].least_usd))

    async def _renew(self) -> None:
        """Renews the reservations of calls in progress, however slowly a caller reads its answer."""
        while self._in_progress:
            await asyncio.sleep(_RENEW_S)
            await answer_in_time(self.ledger.renew(list(self._in_progress)), _HARD_LEDGER_S)

    def _start_probes(self, channels: dict[str, Channel]) -> None:
        """Starts probes of upstreams whose breakers ask for one; no call waits for them."""
        for channel in channels.values():
            if channel.breaker.wants_probe:
                channel.breaker.begin_probe()
                self._spawn(self._probe(channel))

    async def _probe(self, channel: Channel) -> None:
        await channel.probe()
        log.info("upstream probed", extra={"target": channel.target.name, "is_open": channel.breaker.is_open})
        self._set_breaker_metric(channel)

    def _set_breaker_metric(self, channel: Channel) -> None:
        if self._channels.get(channel.target.name) is channel:  # not for a removed target
            self.metrics.breaker.set(float(channel.breaker.is_open), {"target": channel.target.name})

    # --- answer --------------------------------------------------------------------------------------------------

    def _finish(self, active: ActiveCall, stream: UpstreamStream, end: End) -> None:
        """Called when a stream has been relayed or its caller has disconnected."""
        assert active.choice is not None
        active.keep_answer(stream.answer_id)
        active.measured = stream.measured
        self._record(active, end, active.choice.target, stream.usage, stream.text_bytes)
        self._spawn(stream.close())  # not awaited: a disconnect cancels this task

    def _record(
        self,
        active: ActiveCall,
        end: End,
        target: str | None = None,
        usage: Usage | None = None,
        text_bytes: int = 0,
    ) -> None:
        """Records a call's outcome; `target` answered, or began to, with `text_bytes` of text."""
        call, caller, plan = active.call, active.caller, active.plan
        routing = plan.routing if isinstance(plan, RoutedPlan) else None
        decision = active.choice.decision if active.choice is not None else None
        active.lose()
        charge = None
        if target is not None:
            answering = active.channels[target].target
            answers = usual_answers(call)
            charge = charge_of(answering, usage, active.reserved_usd, plan.input_tokens, text_bytes, answers)
        record = CallRecord(
            request_id=caller.request_id,
            caller=caller.name,
            at=datetime.now(UTC),
            end=end,
            target=target,
            failed=active.failed,
            is_pinned=call.pinned is not None,
            is_sticky=isinstance(plan, FixedPlan) and plan.sticky is not None,
            usage=usage if charge is not None and charge.kind == "reported" else None,
            counted_tokens=plan.input_tokens,
            cost_usd=None if charge is None else charge.usd,
            cost_kind="reported" if charge is None else charge.kind,
            lost_usd=active.lost_usd,
            answer_key=active.answer_key.hex() if active.answer_key is not None else None,
        )
        if end == "answered" and active.measured is not None and call.num_answers == 1:
            record = replace(record, first_token_s=active.measured.first_s, answer_s=active.measured.whole_s)
            self._learn_times(record, active.measured, plan.input_tokens)
        self.metrics.ended(record)
        if plan.sticky is not None and target is not None:
            self.metrics.moved.inc(1, tags={"outcome": "kept" if target == plan.sticky else "moved"})
        if routing is not None and decision is not None and target is not None:
            self.endpoint.record(routing, decision, caller.request_id)
        prompt = routing.question.prompt if routing is not None else self._prompt(call)
        record = self._with_estimates(record, prompt, decision)
        if routing is not None and decision is not None:
            pool = routing.head.router.pool
            expected = {target.name: expected_usd(target, decision, call) for target in pool.targets}
            record = replace(record, expected_cost_usd=expected)
        self._store(record, active)

    def _learn_times(self, record: CallRecord, measured: MeasuredTimes, input_tokens: int) -> None:
        """Adds an answer's times to those of its target, and to the metrics."""
        assert record.target is not None
        if record.usage is not None and record.usage.output_tokens:
            self.endpoint.times.of(record.target).add(input_tokens, record.usage.output_tokens, measured)
        if measured.first_s is not None:
            self.metrics.first_token.observe(max(measured.first_s, 1e-9), tags={"target": record.target})

    def _prompt(self, call: Call) -> Prompt | None:
        """The prompt of a call that was not routed; None if feedback is disabled or the router could not read it."""
        if self._planner.settings.ledger.folder is None:
            return None
        try:
            return call.question.question_of(self.endpoint.now.settings.limits.messages).prompt
        except UserError:
            return None

    def _with_estimates(self, record: CallRecord, prompt: Prompt | None, decision: Decision | None) -> CallRecord:
        """Adds the prompt and the router's estimates to a record."""
        if prompt is not None:
            kept = prompt if self._planner.settings.ledger.keep_prompts else None
            record = replace(record, prompt_id=content_hash(prompt), prompt=kept)
        if decision is None:
            return record
        return replace(
            record,
            p_correct=decision.p_correct,
            expected_cost_usd=decision.expected_cost_usd,
            propensity=decision.propensity,
            router_version=decision.router_version,
        )

    def record_decision(self, routing: Routing, decision: Decision, request_id: str, caller: str) -> None:
        """Records a decision of POST /v1/route, for which feedback may follow."""
        record = CallRecord(request_id, caller, datetime.now(UTC), "routed", decision.target)
        self._store(self._with_estimates(record, routing.question.prompt, decision))

    def _store(self, record: CallRecord, active: ActiveCall | None = None) -> None:
        async def note() -> None:
            try:
                if active is None:
                    await self._recorded(record, [])
                else:  # a reservation made after the record would remain
                    await asyncio.gather(*active.reserving, return_exceptions=True)
                    self._in_progress.pop(active.ticket, None)
                    await self._recorded(record, active.keys, active.ticket, active.main)
            except Exception:
                log.exception("call not recorded in the ledger", extra={"route_id": record.request_id})

        self._spawn(note())

    async def _recorded(self, record: CallRecord, *rest: Any) -> None:
        """Records a call, which was paid for: a ledger that is away, such as one that starts again, is asked again."""
        for wait_s in _RECORD_AGAIN_S:
            try:
                await self.ledger.record(record, *rest)
            except LedgerUnavailable:
                await asyncio.sleep(wait_s)
            else:
                return
        await self.ledger.record(record, *rest)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self._tasks.discard)
