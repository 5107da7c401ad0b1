"""The endpoint without HTTP: turns a request into a decision, and applies new settings while it runs."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import SystemRandom

from prefill_router.common.errors import UserError
from prefill_router.corpus.reader import Prompt, content_digest
from prefill_router.policy.answer_times import AnswerTimes
from prefill_router.policy.decision import Decision, KnownPrefix, Policy, Prediction, decide_one, explain, explore
from prefill_router.policy.selection import OUT_OF_DISTRIBUTION_SHARE
from prefill_serve.endpoint_metrics import Metrics
from prefill_serve.engine import Engine, Estimate, Head, PromptReading, Times
from prefill_serve.scheduler import Overloaded
from prefill_serve.serving import Serving, router_stamps
from prefill_serve.settings import Settings
from prefill_serve.traces import tracer
from prefill_serve.wire import Drift, Metadata, Question, RouteRequest, RouteResponse, TargetReason, Timings

log = logging.getLogger("ray.serve")  # Serve writes it as JSON lines with replica and request id

RECORD_AFTER_S = 0.005  # metrics and logs wait until the answer has been sent
CONSTRAINTS = "raise max_cost_usd or max_latency_s, lower min_p_correct or extend models"  # to meet fewer
_RANDOM = SystemRandom()  # forked processes draw different numbers


# Caller, head names, missing encoders, content digest of the prompt. Without the missing encoders, a reading would be
# used after they are back.
_Key = tuple[str, tuple[str, ...], tuple[str, ...], bytes]


class NotReady(Exception):  # noqa: N818 - a state, not a fault
    """No router is loaded yet; says what the endpoint is waiting for."""


class NoTarget(UserError):  # noqa: N818 - an answer, not a fault
    """No target meets the constraints of a request."""


class UnknownTarget(UserError):  # noqa: N818 - an answer, not a fault
    """A request names a target that the pool lacks."""


class TooLong(UserError):  # noqa: N818 - an answer, not a fault
    """The prompt has more tokens than `limits.prompt_tokens`."""


class Endpoint:
    """Answers requests with the loaded routers, on `num_threads` cores. Bound to one event loop."""

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self.metrics = Metrics()
        self.times = AnswerTimes()  # of the gateway's calls
        self.serving: Serving | None = None
        self.waits_for = "settings"  # until `serving` is there
        self.refused: str | None = None  # why the latest settings were refused
        self.on_routed: Callable[[Routing, Decision, str, str], None] | None = None  # gets each decision
        self._configuring = asyncio.Lock()
        self._refused_stamps: tuple[str, ...] = ()  # of artifacts that could not be loaded
        self._closing: set[asyncio.Task[None]] = set()
        # Tasks, so that equal prompts that arrive together are encoded once. Keyed by caller: a cache hit would reveal
        # another caller's prompts, by its flag or by its speed.
        self._readings: OrderedDict[_Key, asyncio.Task[PromptReading]] = OrderedDict()

    # --- settings ------------------------------------------------------------------------------------------------

    async def configure(self, settings: Settings) -> None:
        """Loads routers and encoder, warms them up with real forward passes, then switches to them.

        Raises UserError for settings that cannot be loaded; the current ones stay in use.
        """
        async with self._configuring:
            await self._apply(settings)

    async def refresh(self) -> None:
        """Loads the routers of the current settings again if others were written to their paths.

        An invalid artifact is refused once, as by `configure`; any other failure is raised, and tried again next time.
        """
        async with self._configuring:
            settings = self.now.settings
            stamps = await asyncio.to_thread(router_stamps, settings)
            if stamps in (self.now.stamps, self._refused_stamps):
                return
            try:
                await self._apply(settings)
            except UserError:
                self._refused_stamps = stamps

    async def _apply(self, settings: Settings) -> None:
        before = self.serving
        try:
            serving = await asyncio.to_thread(Serving.load, settings, self.num_threads, before, self._wait_for)
            self._wait_for("a first forward pass")
            await self._warm_up(serving, before)
        except Exception as error:
            self._wait_for("valid settings")
            self.refuse(str(error) if isinstance(error, UserError) else f"{settings.router}: {error}")
            raise
        self.serving, self.refused = serving, None
        if before is not None and before.engine is not serving.engine:
            self._close(before.engine)
        self._describe(before, serving)

    def refuse(self, reason: str) -> None:
        """Makes known that new settings were refused, and why."""
        self.refused = reason
        self.metrics.settings.inc(1, tags={"outcome": "refused"})
        log.error("settings refused", extra={"reason": reason})

    def _wait_for(self, what: str) -> None:
        self.waits_for = what

    async def _warm_up(self, serving: Serving, before: Serving | None) -> None:
        """Runs forward passes. Closes a new engine whose passes fail."""
        try:
            await serving.engine.warm_up(serving.heads)
        except Exception:
            if before is None or before.engine is not serving.engine:
                self._close(serving.engine)
            raise

    def _close(self, engine: Engine) -> None:
        self._closing.add(task := asyncio.create_task(engine.close()))
        task.add_done_callback(self._closing.discard)

    def _describe(self, before: Serving | None, serving: Serving) -> None:
        self.metrics.settings.inc(1, tags={"outcome": "taken_over"})
        for head in before.heads if before is not None else []:
            self.metrics.router.forget({"version": head.version, "role": _role(before, head)})
        for head in serving.heads:
            self.metrics.router.set(1.0, {"version": head.version, "role": _role(serving, head)})
        self.metrics.queued_tokens.set(serving.engine.scheduler.queued_tokens)
        log.info("settings applied", extra={"router_version": serving.primary.version})

    @property
    def now(self) -> Serving:
        """The loaded routers. Raises NotReady before the first settings are applied."""
        if self.serving is None:
            raise NotReady(f"waiting for {self.waits_for}")
        return self.serving

    # --- requests ------------------------------------------------------------------------------------------------

    async def route(self, request: RouteRequest, request_id: str, caller: str = "") -> RouteResponse:
        """Chooses the target for one prompt: the cheapest that is good enough under the request's constraints.

        Raises UserError, or one of its subclasses above, for a request that cannot be met; Overloaded if the prompt
        would wait too long in the queue.
        """
        routing = await self.read(request, caller=caller)
        decision = routing.decide(routing.policy)
        if decision.target is None:
            raise NoTarget(f"no target meets the constraints: {CONSTRAINTS}")
        answer = routing.response(decision, request_id, explained=request.explain)
        _later(self.record, routing, decision, request_id)
        if self.on_routed is not None:
            _later(self.on_routed, routing, decision, request_id, caller)
        return answer

    async def read(self, request: RouteRequest, max_wait_s: float = math.inf, caller: str = "") -> Routing:
        """Reads a prompt with the loaded routers. Raises what `route` does, except NoTarget."""
        serving = self.now
        max_wait_s = min(max_wait_s, serving.settings.limits.wait_s)
        question = request.question_of(serving.settings.limits.messages)
        policy = request.policy()
        if policy.max_latency is None:
            policy = replace(policy, max_latency=serving.settings.max_latency_s)
        digest = content_digest(question.prompt)
        head = serving.head_for(digest)
        _check_targets(policy, head)
        asked = serving.asked(head)
        key = caller, tuple(each.name for each in asked), serving.engine.sensors.missing, digest
        cached = self._readings.get(key)
        is_cached = cached is not None and cached.done()
        if cached is None:
            cached = self._remember(key, asyncio.create_task(self._read(serving, asked, question.prompt, max_wait_s)))
        else:
            self._readings.move_to_end(key)
            self.metrics.prompts.inc(1, tags={"source": "cache"})
        # Shielded: a caller that disconnects must not cancel the reading for others that wait for it.
        try:
            reading = await asyncio.shield(cached)
        except Overloaded as refusal:
            if refusal.max_wait_s >= max_wait_s:
                raise
            return await self.read(request, max_wait_s, caller)  # refused by another request's shorter limit
        return Routing(serving, head, question, policy, reading, is_cached, self.times)

    def record(self, routing: Routing, decision: Decision, request_id: str) -> None:
        """Records a decision in metrics and log."""
        assert decision.target is not None
        role, reading, settings = routing.role, routing.reading, routing.serving.settings
        self.metrics.decided(decision, reading.estimates[0], role, routing.is_outlier)
        fields: dict[str, object] = {
            "route_id": request_id,
            "target": decision.target,
            "p_correct": decision.p_correct[decision.target],
            "expected_cost_usd": decision.expected_cost_usd[decision.target],
            "router_version": decision.router_version,
            "input_tokens": decision.input_tokens,
            "is_cached": routing.is_cached,
        }
        if reading.missing:
            fields["missing_encoders"] = list(reading.missing)
        if settings.log_prompts:
            fields["prompt"] = routing.question.prompt
        if routing.serving.shadow is not None and len(reading.estimates) > 1:
            prediction = reading.estimates[1].prediction
            shadow = _decision(routing.serving.shadow, reading, prediction, routing.policy, routing.times)
            self.metrics.shadow.inc(1, tags={"agrees": str(shadow.target == decision.target).lower()})
            fields |= {"shadow_target": shadow.target, "shadow_version": shadow.router_version}
        log.info("routed", extra=fields)

    async def check(self) -> None:
        """Reads a test prompt with tokenizer, queue, encoder and heads, bypassing the cache. Raises whatever fails."""
        serving = self.now
        tokens, _ = await serving.engine.tokenize("Hello.")
        await serving.engine.read(tokens, serving.heads)

    async def _read(self, serving: Serving, asked: list[Head], prompt: Prompt, max_wait_s: float) -> PromptReading:
        limits, engine = serving.settings.limits, serving.engine
        engine.scheduler.admit(max_wait_s)  # refuse before tokenization, which costs time
        with tracer.start_as_current_span("tokenize"):
            tokens, tokenize_s = await engine.tokenize(prompt)
        if (length := int(next(iter(tokens.values())).full_lengths[0])) > limits.prompt_tokens:
            raise TooLong(f"prompt has {length:,} tokens, must have at most {limits.prompt_tokens:,}")
        with tracer.start_as_current_span("read") as span:
            try:
                reading = await engine.read(tokens, asked, max_wait_s, tokenize_s)
            finally:
                self.metrics.queued_tokens.set(engine.scheduler.queued_tokens)
            span.set_attributes({f"{phase}_s": seconds for phase, seconds in reading.times._asdict().items()})
        _later(self.metrics.read, reading, engine.scheduler.budget_tokens)
        return reading

    def _remember(self, key: _Key, task: asyncio.Task[PromptReading]) -> asyncio.Task[PromptReading]:
        """Caches a reading; drops it if it, or one of its encoders, fails, and evicts the least recently used."""
        self._readings[key] = task

        def forget_failure(done: asyncio.Task[PromptReading]) -> None:
            has_failed = done.cancelled() or done.exception() is not None or done.result().missing != key[2]
            if has_failed and self._readings.get(key) is done:
                del self._readings[key]
            while len(self._readings) > self.now.settings.cached_prompts:
                self._readings.popitem(last=False)

        task.add_done_callback(forget_failure)
        return task


@dataclass(frozen=True)
class Routing:
    """A prompt with its estimates and the routers that made them, before a decision."""

    serving: Serving
    head: Head
    question: Question
    policy: Policy
    reading: PromptReading
    is_cached: bool
    times: AnswerTimes

    @property
    def role(self) -> str:
        return _role(self.serving, self.head)

    @property
    def is_outlier(self) -> bool:
        """Whether the prompt is outside the training distribution."""
        safe, percentile = self.serving.settings.safe, self.reading.estimates[0].percentile
        return percentile is not None and percentile >= (OUT_OF_DISTRIBUTION_SHARE if safe is None else safe.beyond)

    def decide(self, policy: Policy, *, explores: bool = True, known: KnownPrefix | None = None) -> Decision:
        """Decides under a policy. Out-of-distribution prompts go to the safe target, if it is set and allowed.

        `known` is what a conversation has taught about the prompt.
        """
        safe, prediction = self.serving.settings.safe, self.reading.estimates[0].prediction
        if self.is_outlier and safe is not None and (policy.allowed is None or safe.target in policy.allowed):
            safely = replace(policy, allowed=[safe.target])
            decision = _decision(self.head, self.reading, prediction, safely, self.times, known)
            if decision.target is not None:
                return replace(decision, is_safe=True)
        decision = _decision(self.head, self.reading, prediction, policy, self.times, known)
        return explore(decision, policy, self.serving.settings.explore if explores else 0.0, _RANDOM)

    def response(self, decision: Decision, request_id: str, *, explained: bool) -> RouteResponse:
        """The response to the caller."""
        assert decision.target is not None
        tolerance = self.head.tolerance if self.policy.tolerance is None else self.policy.tolerance
        reasons = explain(decision, self.policy, tolerance) if explained else {}
        times = decision.expected_times if explained else {}
        metadata = Metadata(
            encoder=self.serving.engine.encoder_names,
            missing_encoders=list(self.reading.missing),
            input_tokens=decision.input_tokens,
            is_truncated=decision.is_truncated,
            tolerance=tolerance,
            propensity=decision.propensity,
            is_canary=self.role == "canary",
            is_cached=self.is_cached,
            noted=self.question.noted,
            ignored=self.question.ignored,
            drift=_drift(self.reading.estimates[0], self.is_outlier),
            timings_ms=_milliseconds(Times(0.0, 0.0, 0.0, 0.0) if self.is_cached else self.reading.times),
        )
        return RouteResponse(
            selected_model=decision.target,
            model_names=list(decision.p_correct),
            confidences=list(decision.p_correct.values()),
            costs=list(decision.expected_cost_usd.values()),
            metadata=metadata,
            p_correct=decision.p_correct,
            expected_cost_usd=decision.expected_cost_usd,
            expected_output_tokens=decision.expected_output_tokens,
            router_version=decision.router_version,
            expected_first_token_s={name: s for name, (s, _) in times.items() if s is not None},
            expected_s={name: s for name, (_, s) in times.items() if s is not None},
            request_id=request_id,
            explanation={target: why.text for target, why in reasons.items()} if explained else None,
            reasons={t: TargetReason(code=why.code, value=why.value, limit=why.limit) for t, why in reasons.items()},
        )


def _later(record: Callable[..., None], *args: object) -> None:
    """Calls `record` once the answer has been sent."""
    asyncio.get_running_loop().call_later(RECORD_AFTER_S, record, *args)


def _check_targets(policy: Policy, head: Head) -> None:
    """Raises UnknownTarget if the policy names a target that the pool lacks."""
    try:
        policy.mask(head.router.pool)
    except UserError as error:
        raise UnknownTarget(str(error)) from None


def _decision(
    head: Head,
    reading: PromptReading,
    prediction: Prediction,
    policy: Policy,
    times: AnswerTimes,
    known: KnownPrefix | None = None,
) -> Decision:
    lengths = reading.input_tokens, reading.is_truncated
    return decide_one(head.router.pool, prediction, *lengths, policy, head.tolerance, head.version, known, times)


def _drift(estimate: Estimate, is_outlier: bool) -> Drift | None:
    if estimate.distance is None or estimate.percentile is None:
        return None
    return Drift(distance=estimate.distance, percentile=estimate.percentile, is_out_of_distribution=is_outlier)


def _milliseconds(times: Times) -> Timings:
    return Timings(**{phase: round(seconds * 1e3, 3) for phase, seconds in times._asdict().items()})


def _role(serving: Serving | None, head: Head) -> str:
    if serving is None or head is serving.primary:
        return "router"
    return "canary" if head is serving.canary else "shadow"


def new_request_id() -> str:
    return f"route-{os.urandom(12).hex()}"
