"""Prometheus metrics of the endpoint, exported by Ray, which adds labels for node and worker."""

from __future__ import annotations

import math

from ray.util.metrics import Counter, Gauge, Histogram

from prefill_router.common.gauges import KeptGauge
from prefill_router.policy.decision import Decision
from prefill_serve.engine import Estimate, PromptReading

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
_SHARES = [i / 20 for i in range(1, 21)]
_TOKENS = [16.0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
_DISTANCES = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0]


class Metrics:
    """The endpoint's metrics, one instance per process; every name starts with `prefill_router_`."""

    def __init__(self) -> None:
        self.requests = counter("requests", "HTTP requests by route and status", "route", "status")
        self.request_seconds = histogram("request_seconds", "Seconds from request headers to answer", SECONDS, "route")
        self.phase_seconds = histogram("phase_seconds", "Seconds per prompt, by phase", SECONDS, "phase")
        self.batch_tokens = histogram("batch_tokens", "Tokens in the batch that a prompt was encoded in", _TOKENS)
        self.batch_fill = histogram("batch_fill", "Tokens of a batch as a share of its limit", _SHARES)
        self.queued_tokens = gauge("queued_tokens", "Tokens of queued prompts")
        self.prompts = counter("prompts", "Prompts by source of their estimates: encoder or cache", "source")
        self.degraded = counter("degraded_prompts", "Prompts that were read without an encoder", "encoder")
        self.truncated = counter("truncated_prompts", "Prompts whose middle was cut before encoding")
        self.routed = counter("routed", "Decisions by target and role (router or canary)", "target", "role")
        self.expected_cost = counter("expected_cost_usd", "Expected cost of the chosen targets' answers", "target")
        self.p_correct = histogram("p_correct", "P(correct) of the chosen target", _SHARES, "role")
        self.distance = histogram("drift_distance", "Distance from training prompts, typically 1", _DISTANCES)
        self.own_distance = histogram(
            "encoder_drift_distance", "Distance by one of several encoders, typically 1", _DISTANCES, "encoder"
        )
        self.out_of_distribution = counter("out_of_distribution", "Prompts outside the training distribution")
        self.shadow = counter("shadow", "Shadow router's choices: same target as the router's or another", "agrees")
        self.settings = counter("settings", "Settings that were applied or refused", "outcome")
        self.router = gauge("info", "1 for each loaded router", "version", "role")

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.inc(1, tags={"route": route, "status": str(status)})
        self.request_seconds.observe(max(seconds, 1e-9), tags={"route": route})

    def read(self, reading: PromptReading, budget_tokens: int) -> None:
        self.prompts.inc(1, tags={"source": "encoder"})
        for name in reading.missing:
            self.degraded.inc(1, tags={"encoder": name})
        for phase, seconds in reading.times._asdict().items():
            self.phase_seconds.observe(max(seconds, 1e-9), tags={"phase": phase})
        self.batch_tokens.observe(reading.batch_tokens)
        self.batch_fill.observe(max(min(1.0, reading.batch_tokens / budget_tokens), 1e-9))

    def decided(self, decision: Decision, estimate: Estimate, role: str, is_outlier: bool) -> None:
        assert decision.target is not None
        self.routed.inc(1, tags={"target": decision.target, "role": role})
        cost_usd = decision.expected_cost_usd[decision.target]
        if cost_usd > 0.0 and math.isfinite(cost_usd):
            self.expected_cost.inc(cost_usd, tags={"target": decision.target})
        self.p_correct.observe(max(decision.p_correct[decision.target], 1e-9), tags={"role": role})
        if decision.is_truncated:
            self.truncated.inc(1)
        if estimate.distance is not None:
            self.distance.observe(max(estimate.distance, 1e-9))
        for name, distance in estimate.own_distances.items():
            self.own_distance.observe(max(distance, 1e-9), tags={"encoder": name})
        if is_outlier:
            self.out_of_distribution.inc(1)


def counter(name: str, description: str, *tags: str) -> Counter:
    """A Ray counter named `prefill_router_NAME` with the given labels; Ray's exporter appends `_total`."""
    return Counter(f"prefill_router_{name}", description=description, tag_keys=tags)


def gauge(name: str, description: str, *tags: str) -> KeptGauge:
    return KeptGauge(Gauge(f"prefill_router_{name}", description=description, tag_keys=tags))


def histogram(name: str, description: str, boundaries: list[float], *tags: str) -> Histogram:
    return Histogram(f"prefill_router_{name}", description=description, boundaries=boundaries, tag_keys=tags)
