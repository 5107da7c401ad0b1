"""Proxies a call: chooses a target, falls back to the next if its upstream fails, and relays the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from prefill_router.common.errors import UserError
from prefill_router.corpus.reader import Prompt, content_hash
from prefill_router.policy.decision import Decision
from prefill_router.upstreams.transport import http_client
from prefill_serve.endpoint import Endpoint, NoTarget, Routing, UnknownTarget
from prefill_serve.gateway.call_record import End, Served, Usage
from prefill_serve.gateway.candidates import Candidate, Fixed, Plan, Routed, can_take, default_order, guessed_tokens
from prefill_serve.gateway.charges import OverLimit, charge_of, expected_usd, guessed_usd, most_usd
from prefill_serve.gateway.gateway_metrics import GatewayMetrics
from prefill_serve.gateway.openai_calls import Body, Call
from prefill_serve.gateway.state.call_ledger import Bid, CallLedger, LedgerAway
from prefill_serve.gateway.state.conversations import Key, answer_key, keys_of
from prefill_serve.gateway.state.reservations import LAPSES_S, Exhausted, Reserved
from prefill_serve.gateway.upstream import Attempt, Channel, Failed, Stream, UpstreamRefusal
from prefill_serve.middleware.gate import Refusal
from prefill_serve.settings import Budgets, GatewaySettings

log = logging.getLogger("ray.serve")

_WAIT = (429, 503)
LEDGER_S = 0.25  # limit for ledger requests that a call can do without
_RENEW_S = LAPSES_S / 4
_HARD_LEDGER_S = 5.0  # a call under a hard limit needs the ledger's answer
_T = TypeVar("_T")
_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')


class NoUpstream(UserError):  # noqa: N818 - an answer, not a fault
    """No target of the pool has an upstream."""


class UnknownAnswer(UserError):  # noqa: N818 - an answer, not a fault
    """A call continues an answer that the ledger does not know as this caller's."""


class Caller(NamedTuple):
    """The caller's name, the request's id, and the caller's id of the conversation."""

    holder: str
    request_id: str
    session: str | None = None


@dataclass
class _Passage:
    """A call in progress."""

    call: Call
    caller: Caller
    plan: Plan
    channels: dict[str, Channel]  # by target
    keys: list[Key]  # of its conversation
    choice: Candidate | None = None
    failed: list[str] = field(default_factory=list)
    ticket: str = field(default_factory=lambda: uuid4().hex)  # unlike the request id, unique
    reserving: list[asyncio.Future[Reserved | Exhausted]] = field(default_factory=list)
    reserved_usd: float = 0.0  # for the current target
    attempt: Attempt | None = None  # in progress
    lost_usd: dict[str, float] = field(default_factory=dict)  # by target: billable attempts without an answer
    answer_key: Key | None = None  # finds the target that stores the answer, for the next call

    def keep_answer(self, answer_id: str | None) -> None:
        """Records the id under which the upstream stores the answer, if any."""
        if answer_id is not None:
            self.answer_key = answer_key(self.caller.holder, answer_id)
            self.keys.append(self.answer_key)

    def choose(self, plan: Plan) -> Candidate | None:
        """The next target to try: of those that can take the call, preferably one that is ready."""
        able = [
            name
            for name, channel in self.channels.items()
            if name not in self.failed and can_take(channel.target, self.call, self.plan.input_tokens)
        ]
        ready = [name for name in able if self.channels[name].is_ready]
        return plan.choose(ready) or plan.choose(able)

    def bid(self, choice: Candidate) -> Bid:
        """The call's expected cost at a target or, under a hard limit, the most it can cost."""
        target, call = self.channels[choice.target].target, self.call
        usd, least_usd = None, 0.0
        if call.answer_tokens is not None:
            least_usd = most_usd(target, call)
            usd = None if call.continues else least_usd  # the stored conversation's length is unknown
        elif choice.expected_usd is not None:
            usd = expected_usd(choice.expected_usd, call)
        else:
            least_usd = guessed_usd(target, call, self.plan.input_tokens)
        return Bid(choice.target, usd, least_usd, sum(self.lost_usd.values()))

    def lose(self) -> None:
        """Charges the current attempt, which ends without an answer, if its upstream may bill it."""
        if self.attempt is not None and self.attempt.is_billable and self.choice is not None:
            target = self.channels[self.choice.target].target
            charge = charge_of(target, None, self.reserved_usd, self.plan.input_tokens, 0)
            self.lost_usd[target.name] = charge.usd
        self.attempt = None


class Proxy:
    """Answers calls with the loaded router. Bound to one event loop."""

    def __init__(self, endpoint: Endpoint, ledger: CallLedger) -> None:
        self.endpoint, self.ledger, self.metrics = endpoint, ledger, GatewayMetrics()
        self._http = http_client()
        self._channels: dict[str, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: WeakValueDictionary[str, _Passage] = WeakValueDictionary()  # by ticket
        self._renewing: asyncio.Task[None] | None = None

    async def answer(self, call: Call, caller: Caller) -> Response:
        """Returns an upstream's answer, whole or as a stream.

        Raises UserError for a call that no target can take, Refusal if no upstream gave an answer.
        """
        started = perf_counter()
        hard = self._settings.ledger.budgets.hard
        if hard.covers(caller.holder):  # its maximum cost must be known in advance
            call = replace(call, answer_tokens=hard.answer_tokens)
        channels = self._current_channels()
        plan, keys = await self._plan(call, caller, channels)
        passage = _Passage(call, caller, plan, channels, keys)
        try:
            answered = await self._ask(passage)
        except (UpstreamRefusal, OverLimit) as refused:
            self._record(passage, "refused")
            if isinstance(refused, OverLimit):
                raise
            return Response(refused.content, refused.status, _headers(passage), "application/json")
        except (Refusal, LedgerAway):
            self._record(passage, "failed")
            raise
        except asyncio.CancelledError:
            self._record(passage, "cancelled")
            raise
        self.metrics.first_seconds.observe(perf_counter() - started)
        assert passage.choice is not None
        if isinstance(answered, Stream):
            headers = {**_headers(passage), "cache-control": "no-cache", "x-accel-buffering": "no"}
            return Relay(passage, answered, headers, self._finish)
        passage.keep_answer(call.answer_id(answered))
        usage = call.usage(answered)
        text_bytes = 0 if usage is not None and usage.output_tokens else call.answer_bytes(answered)
        self._record(passage, "answered", passage.choice.target, usage, text_bytes)
        content = json.dumps({**answered, "model": passage.choice.target})
        return Response(content, 200, _headers(passage), "application/json")

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    # --- request --------------------------------------------------------------------------------------------------

    def _current_channels(self) -> dict[str, Channel]:
        """Channels by target; a changed target gets a new one."""
        if self.endpoint.now.settings.gateway is None:
            return {}
        targets = self.endpoint.now.primary.router.pool.targets
        known = self._channels
        self._channels = {
            target.name: known[target.name]
            if target.name in known and known[target.name].target == target
            else Channel(target, self._http)
            for target in targets
            if target.upstream is not None
        }
        for name, channel in known.items():
            if self._channels.get(name) is not channel:
                self.metrics.breaker.forget({"target": name})
        return self._channels

    async def _plan(self, call: Call, caller: Caller, channels: dict[str, Channel]) -> tuple[Plan, list[Key]]:
        if not channels:
            raise NoUpstream("this endpoint only routes: to answer calls, set a pool whose targets have upstreams")
        if call.pinned is not None and call.pinned not in channels:
            raise UnknownTarget(f'model "{call.pinned}": must be "auto", or one of {", ".join(channels)}')
        await self._require_own_answer(call, caller)
        if call.pinned is not None:
            return Fixed([call.pinned], guessed_tokens(call)), []
        earlier, here = keys_of(call, caller.holder, caller.session)
        past = asyncio.create_task(self._past(earlier))
        return await self._routed(call, caller, past), [here]

    async def _require_own_answer(self, call: Call, caller: Caller) -> None:
        """Raises UnknownAnswer for a call that continues an unknown answer or another caller's.

        An upstream stores the answers to all callers under one key, and would continue any of them. Without keys there
        is one caller, so the upstream may be asked.
        """
        if call.continues is None or self.endpoint.now.settings.open:
            return
        if await self.ledger.target_of_answer(answer_key(caller.holder, call.continues)) is None:
            raise UnknownAnswer(
                f'previous_response_id "{call.continues}": not found: it may be too old; send the conversation as input'
            )

    async def _routed(self, call: Call, caller: Caller, past: asyncio.Task[str | None]) -> Plan:
        settings = self._settings
        allowed = call.allowed
        if call.continues is not None and (target := await past) is not None:  # only its target stores the conversation
            return Fixed([target], guessed_tokens(call), sticky=target)
        try:
            async with asyncio.timeout(settings.route_timeout_s):
                routing = await self.endpoint.read(call.question, settings.route_timeout_s, caller.holder)
        except UnknownTarget:
            raise
        except Exception as error:  # the default target can still answer
            return self._unrouted(call, caller, allowed, error)
        return Routed(routing, routing.policy, await past, settings.stick_margin)

    def _unrouted(self, call: Call, caller: Caller, allowed: list[str] | None, error: Exception) -> Fixed:
        """The plan without the router: the default target first."""
        reason = "timeout" if isinstance(error, TimeoutError) else type(error).__name__
        self.metrics.defaults.inc(1, tags={"reason": reason})
        log.warning("routing failed", extra={"route_id": caller.request_id, "reason": str(error) or reason})
        targets = self.endpoint.now.primary.router.pool.targets
        order = default_order(targets, self._settings.default_target, allowed)
        return Fixed(order, guessed_tokens(call))

    async def _past(self, keys: list[Key]) -> str | None:
        """The target of a conversation; None if it is new or the ledger takes too long."""
        return await self._told(self.ledger.target(keys)) if keys else None

    async def _told(self, answer: Awaitable[_T], patience_s: float | None = None) -> _T | None:
        """The ledger's answer; None if it fails or takes too long."""
        try:
            async with asyncio.timeout(patience_s or LEDGER_S):
                return await answer
        except Exception:
            log.warning("ledger unavailable", exc_info=True)
            return None

    async def _ask(self, passage: _Passage) -> Body | Stream:
        """Returns the answer of the first target that gives one."""
        failure: Failed | None = None
        while (channel := await self._next(passage)) is not None:
            try:
                passage.attempt = attempt = Attempt(passage.call, passage.caller.holder)
                answered = await (channel.stream(attempt) if passage.call.is_stream else channel.answer(attempt))
                passage.attempt = None
                return answered
            except Failed as failed:
                passage.lose()
                failure = failed
                passage.failed.append(channel.target.name)
                self.metrics.failures.inc(1, tags={"target": channel.target.name, "reason": failed.reason})
                log.warning("upstream failed", extra=failed.for_log(passage.caller.request_id))
            finally:
                self._tell_breaker(channel)
        if failure is not None and failure.refusal is not None:
            raise failure.refusal
        if failure is None:
            raise NoTarget("no target can take this call: raise max_cost_usd, lower min_p_correct or extend models")
        after = {"retry-after": str(math.ceil(max(failure.retry_after_s, 1.0)))} if failure.status in _WAIT else {}
        raise Refusal(
            failure.status, f"no upstream answered; last failure: {failure}", "upstream_failed", headers=after
        )

    async def _next(self, passage: _Passage) -> Channel | None:
        """The channel of the next target to try. With budgets, reserves its expected cost.

        Raises OverLimit if a hard limit is exceeded, LedgerAway if a hard limit cannot be checked.
        """
        self._probe_in_doubt(passage.channels)
        plan, budgets = passage.plan, self._settings.ledger.budgets
        passage.choice = passage.choose(plan)
        if passage.choice is not None and budgets != Budgets():
            thrifty = plan.thrifty(budgets.tolerance) if isinstance(plan, Routed) else plan
            ways = [(passage.plan, passage.choice), (thrifty, passage.choose(thrifty) or passage.choice)]
            reserved = await self._reserve(passage, [passage.bid(choice) for _, choice in ways])
            passage.plan, passage.choice = ways[reserved.bid]
            passage.reserved_usd = reserved.usd
        elif passage.choice is not None:
            bid = passage.bid(passage.choice)
            passage.reserved_usd = max(bid.usd or 0.0, bid.least_usd)
        return None if passage.choice is None else passage.channels[passage.choice.target]

    async def _reserve(self, passage: _Passage, bids: list[Bid]) -> Reserved:
        """Reserves one of the bids; without the ledger the last, cheaper one, except under a hard limit."""
        is_hard = passage.call.answer_tokens is not None
        reserving = asyncio.ensure_future(self.ledger.reserve(passage.ticket, passage.caller.holder, bids))
        passage.reserving.append(reserving)
        self._under_way[passage.ticket] = passage
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        found = await self._told(asyncio.shield(reserving), _HARD_LEDGER_S if is_hard else LEDGER_S)
        if isinstance(found, Exhausted):
            raise OverLimit(found)
        if found is None and is_hard:
            raise LedgerAway("a hard limit cannot be checked without the ledger")
        return found or Reserved(len(bids) - 1, max(bids[-1].usd or 0.0, bids[-1].least_usd))

    async def _renew(self) -> None:
        """Renews the reservations of calls in progress, however slowly a caller reads its answer."""
        while self._under_way:
            await asyncio.sleep(_RENEW_S)
            await self._told(self.ledger.renew(list(self._under_way)), _HARD_LEDGER_S)

    def _probe_in_doubt(self, channels: dict[str, Channel]) -> None:
        """Starts probes of upstreams whose breakers ask for one; no call waits for them."""
        for channel in channels.values():
            if channel.breaker.wants_probe:
                channel.breaker.begin_probe()
                self._spawn(self._probe(channel))

    async def _probe(self, channel: Channel) -> None:
        await channel.probe()
        log.info("upstream probed", extra={"target": channel.target.name, "is_open": channel.breaker.is_open})
        self._tell_breaker(channel)

    def _tell_breaker(self, channel: Channel) -> None:
        if self._channels.get(channel.target.name) is channel:  # not for a removed target
            self.metrics.breaker.set(float(channel.breaker.is_open), {"target": channel.target.name})

    # --- answer --------------------------------------------------------------------------------------------------

    def _finish(self, passage: _Passage, stream: Stream, end: End) -> None:
        """Called when a stream has been relayed or its caller has disconnected."""
        assert passage.choice is not None
        passage.keep_answer(stream.answer_id)
        self._record(passage, end, passage.choice.target, stream.usage, stream.text_bytes)
        self._spawn(stream.close())  # not awaited: a disconnect cancels this task

    def _record(
        self,
        passage: _Passage,
        end: End,
        target: str | None = None,
        usage: Usage | None = None,
        text_bytes: int = 0,
    ) -> None:
        """Records a call's outcome; `target` answered, or began to, with `text_bytes` of text."""
        call, caller, plan = passage.call, passage.caller, passage.plan
        routing = plan.routing if isinstance(plan, Routed) else None
        decision = passage.choice.decision if passage.choice is not None else None
        passage.lose()
        charge = None
        if target is not None:
            answering = passage.channels[target].target
            charge = charge_of(answering, usage, passage.reserved_usd, plan.input_tokens, text_bytes)
        served = Served(
            request_id=caller.request_id,
            holder=caller.holder,
            at=datetime.now(UTC),
            end=end,
            target=target,
            failed=passage.failed,
            is_pinned=call.pinned is not None,
            is_sticky=isinstance(plan, Fixed) and plan.sticky is not None,
            usage=usage if charge is not None and charge.kind == "reported" else None,
            cost_usd=None if charge is None else charge.usd,
            cost_kind="reported" if charge is None else charge.kind,
            lost_usd=passage.lost_usd,
            answer_key=passage.answer_key.hex() if passage.answer_key is not None else None,
        )
        self.metrics.ended(served)
        if plan.sticky is not None and target is not None:
            self.metrics.moved.inc(1, tags={"outcome": "kept" if target == plan.sticky else "moved"})
        if routing is not None and decision is not None and target is not None:
            self.endpoint.record(routing, decision, caller.request_id)
        prompt = routing.question.prompt if routing is not None else self._prompt(call)
        self._note(self._described(served, prompt, decision), passage)

    def _prompt(self, call: Call) -> Prompt | None:
        """The prompt of a call that was not routed; None if the router could not read it."""
        try:
            return call.question.question_of(self.endpoint.now.settings.limits.messages).prompt
        except UserError:
            return None

    def _described(self, served: Served, prompt: Prompt | None, decision: Decision | None) -> Served:
        """Adds the prompt and the router's estimates to a record."""
        if prompt is not None:
            kept = prompt if self._settings.ledger.keep_prompts else None
            served = replace(served, prompt_id=content_hash(prompt), prompt=kept)
        if decision is None:
            return served
        return replace(
            served,
            p_correct=decision.p_correct,
            expected_cost_usd=decision.expected_cost_usd,
            propensity=decision.propensity,
            router_version=decision.router_version,
        )

    def note_routed(self, routing: Routing, decision: Decision, request_id: str, holder: str) -> None:
        """Records a decision of POST /v1/route, for which feedback may follow."""
        served = Served(request_id, holder, datetime.now(UTC), "routed", decision.target)
        self._note(self._described(served, routing.question.prompt, decision))

    @property
    def _settings(self) -> GatewaySettings:
        return self.endpoint.now.settings.gateway or GatewaySettings()

    def _note(self, served: Served, passage: _Passage | None = None) -> None:
        async def note() -> None:
            try:
                if passage is None:
                    await self.ledger.record(served, [])
                else:  # a reservation made after the record would remain
                    await asyncio.gather(*passage.reserving, return_exceptions=True)
                    self._under_way.pop(passage.ticket, None)
                    await self.ledger.record(served, passage.keys, passage.ticket)
            except Exception:
                log.exception("call not recorded in the ledger", extra={"route_id": served.request_id})

        self._spawn(note())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self._tasks.discard)


class Relay(StreamingResponse):
    """Streams an answer's events with the target's name as model. A stream that fails ends with an error event."""

    def __init__(
        self,
        passage: _Passage,
        stream: Stream,
        headers: dict[str, str],
        finish: Callable[[_Passage, Stream, End], None],
    ) -> None:
        self._passage, self._stream, self._finish = passage, stream, finish
        self._end: End = "cancelled"
        super().__init__(self._events(), 200, headers, "text/event-stream")

    def abandon(self) -> None:
        """Ends an answer whose caller disconnected before it started."""
        self._finish(self._passage, self._stream, self._end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # even if the caller disconnects before the first event
            self._finish(self._passage, self._stream, self._end)

    async def _events(self) -> AsyncIterator[bytes]:
        assert self._passage.choice is not None
        rename = _Renaming(self._passage.choice.target)
        try:
            async for piece in self._stream.pieces():
                if self._stream.is_whole:  # even if the caller disconnects right after the last event
                    self._end = "answered"
                yield rename(piece)
        except Failed as failed:
            self._end = "failed"
            log.warning("upstream failed", extra=failed.for_log(self._passage.caller.request_id))
            yield self._passage.call.error_event(str(failed), "upstream_failed")


class _Renaming:
    """Replaces the upstream's model name with the target's name in the bytes of a stream."""

    def __init__(self, target: str) -> None:
        self._new = b'"model":' + json.dumps(target).encode()
        self._old: bytes | None = None

    def __call__(self, piece: bytes) -> bytes:
        if self._old is None:
            found = _MODEL.search(piece)
            if found is None:
                return piece
            self._old = found.group()
        # In a JSON string the quotes would be escaped, so this matches only the key.
        return piece.replace(self._old, self._new)


def _headers(passage: _Passage) -> dict[str, str]:
    """Response headers that describe the decision."""
    choice = passage.choice
    if choice is None:
        return {}
    headers = {"x-router-selected-model": choice.target.encode("ascii", "backslashreplace").decode()}
    if choice.decision is not None:
        headers["x-router-p-correct"] = f"{choice.decision.p_correct[choice.target]:.4f}"
        headers["x-router-version"] = choice.decision.router_version
    return headers
