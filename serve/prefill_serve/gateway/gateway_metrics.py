"""Prometheus metrics of the gateway."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from prefill_serve.endpoint_metrics import SECONDS, counter, gauge, histogram
from prefill_serve.gateway.call_record import CallRecord


def key_label(name: str) -> str:
    """A metric label for a caller: a digest, so that metrics do not reveal names."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


class GatewayMetrics:
    """The gateway's metrics, one instance per process; every name starts with `prefill_router_`."""

    def __init__(self) -> None:
        self.calls = counter("calls", "Calls by outcome and target", "end", "target")
        self.failures = counter("upstream_failures", "Failed attempts by target and reason", "target", "reason")
        self.refusals = counter("upstream_refusals", "Calls refused by target and kind", "target", "kind")
        self.defaults = counter("default_served", "Calls whose routing failed, by reason", "reason")
        self.breaker = gauge("breaker_open", "1 while the target's circuit breaker is open", "target")
        self.moved = counter("conversations", "Conversations that kept their target or moved", "outcome")
        self.cost = counter("actual_cost_usd", "Charged cost by target and kind", "target", "kind")
        self.tokens = counter("upstream_tokens", "Tokens reported by upstreams", "target", "kind")
        self.first_seconds = histogram("first_event_seconds", "Seconds from call to first event", SECONDS)
        self.first_token = histogram(
            "first_token_seconds", "Seconds from request to first token of a stream", [*SECONDS, 20.0, 60.0], "target"
        )

    def ended(self, record: CallRecord) -> None:
        target = record.target or "none"
        self.calls.inc(1, tags={"end": record.end, "target": target})
        if record.cost_usd:
            self.cost.inc(record.cost_usd, tags={"target": target, "kind": record.cost_kind})
        for lost, usd in record.lost_usd.items():
            if usd:
                self.cost.inc(usd, tags={"target": lost, "kind": "reserved"})
        if record.usage is not None:
            for kind, tokens in record.usage._asdict().items():
                if tokens:
                    self.tokens.inc(tokens, tags={"target": target, "kind": kind.removesuffix("_tokens")})


class MemoryMetrics:
    """Metrics of the process that stores calls."""

    def __init__(self) -> None:
        self.calls = gauge("remembered_calls", "Stored calls that can still get feedback")
        self.prompt_bytes = gauge("remembered_prompt_bytes", "Bytes of their prompts, if prompts are stored")

    def holds(self, num_calls: int, prompt_bytes: int) -> None:
        self.calls.set(float(num_calls))
        self.prompt_bytes.set(float(prompt_bytes))


class BudgetMetrics:
    """Metrics of the process that keeps the accounts."""

    def __init__(self) -> None:
        self.share = gauge("budget_spent_share", "Share of today's budget spent, by hash of the caller, or all", "key")
        self._keys: set[str] = set()

    def spent(self, shares: Mapping[str | None, float]) -> None:
        """Sets the spent share of each caller's budget; None, for all callers together, gets the label `all`."""
        by_key = {"all" if key is None else key_label(key): share for key, share in shares.items()}
        for key in self._keys - set(by_key):
            self.share.forget({"key": key})
        for key, share in by_key.items():
            self.share.set(share, {"key": key})
        self._keys = set(by_key)
