"""What operators watch of the gateway, beside the endpoint's own metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from prefill_serve.endpoint_metrics import SECONDS, counter, gauge, histogram
from prefill_serve.gateway.call_record import Served


def key_label(name: str) -> str:
    """A label for the key of this name: a digest, as whoever reads metrics need not know who has a key."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


class GatewayMetrics:
    """One of each a process; every name begins with `prefill_router_`."""

    def __init__(self) -> None:
        self.calls = counter("calls", "Calls by how they ended and by the target", "end", "target")
        self.failures = counter("upstream_failures", "Upstreams that gave no answer", "target", "reason")
        self.defaults = counter("default_served", "Calls without a routing decision, by why", "reason")
        self.breaker = gauge("breaker_open", "1 where the latest call left the upstream alone for a while", "target")
        self.moved = counter("conversations", "Conversations that kept their target or moved", "outcome")
        self.cost = counter("actual_cost_usd", "What calls are charged, reported by upstreams or not", "target", "kind")
        self.tokens = counter("upstream_tokens", "By upstreams' usage", "target", "kind")
        self.first_seconds = histogram("first_event_seconds", "From the call to the answer's first event", SECONDS)

    def ended(self, served: Served) -> None:
        target = served.target or "none"
        self.calls.inc(1, tags={"end": served.end, "target": target})
        if served.cost_usd:
            self.cost.inc(served.cost_usd, tags={"target": target, "kind": served.cost_kind})
        for lost, usd in served.lost_usd.items():
            if usd:
                self.cost.inc(usd, tags={"target": lost, "kind": "reserved"})
        if served.usage is not None:
            for kind, tokens in served.usage._asdict().items():
                if tokens:
                    self.tokens.inc(tokens, tags={"target": target, "kind": kind.removesuffix("_tokens")})


class MemoryMetrics:
    """Of the one process that remembers calls."""

    def __init__(self) -> None:
        self.calls = gauge("remembered_calls", "Calls that feedback can still come for")
        self.prompt_bytes = gauge("remembered_prompt_bytes", "Of their prompts, where prompts are kept")

    def holds(self, num_calls: int, prompt_bytes: int) -> None:
        self.calls.set(float(num_calls))
        self.prompt_bytes.set(float(prompt_bytes))


class BudgetMetrics:
    """Of the one process that keeps the accounts."""

    def __init__(self) -> None:
        self.share = gauge("budget_spent_share", "Of today's budget, by the key's hash; all: of all keys", "key")
        self._keys: set[str] = set()

    def spent(self, shares: Mapping[str | None, float]) -> None:
        """Of all together under the key `all`."""
        by_key = {"all" if key is None else key_label(key): share for key, share in shares.items()}
        for key in self._keys - set(by_key):
            self.share.forget({"key": key})
        for key, share in by_key.items():
            self.share.set(share, {"key": key})
        self._keys = set(by_key)
