"""Gauges of endpoint and gateway stay exported while idle, and are removed with their subject."""

from __future__ import annotations

import asyncio
import subprocess
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util.metrics import Gauge

from prefill_router.common.gauges import REFRESHER, KeptGauge
from prefill_router.policy.pool import Pool, Target
from prefill_router.router.artifact import Router
from prefill_serve.gateway.call_record import CallRecord
from prefill_serve.gateway.gateway_metrics import GatewayMetrics, key_label
from prefill_serve.gateway.proxy import Proxy
from prefill_serve.gateway.state import call_ledger as module
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.settings import LedgerSettings
from served import Api

Told = list[tuple[Any, float, dict[str, str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Records the values that gauges are set to."""
    values: Told = []
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, tags=None: values.append((gauge, value, tags or {})))
    return values


def refreshed(told: Told, kept: KeptGauge) -> list[tuple[float, dict[str, str]]]:
    """The value that the refresher sets a gauge to."""
    told.clear()
    REFRESHER.refresh()
    return [(value, tags) for gauge, value, tags in told if gauge is kept.gauge]


def test_an_upstream_that_is_left_alone_is_told_of_without_a_call(told: Told) -> None:
    metrics = GatewayMetrics()
    metrics.breaker.set(1.0, {"target": "big"})
    assert refreshed(told, metrics.breaker) == [(1.0, {"target": "big"})]


def test_an_upstream_that_is_not_there_any_more_is_not_told_of(told: Told) -> None:
    """Nor for a target whose upstream changed: its breaker is new."""

    def endpoint(url: str) -> Any:
        way = {"base_url": url, "model": "m"}
        target = Target.model_validate({"name": "big", "input_price": 1.0, "output_price": 1.0, "upstream": way})
        primary = SimpleNamespace(router=SimpleNamespace(pool=Pool(name="p", targets=(target,))))
        return SimpleNamespace(now=SimpleNamespace(settings=SimpleNamespace(gateway=True), primary=primary))

    async def scenario() -> None:
        proxy = Proxy(endpoint("http://a/v1"), LocalLedger())
        breaker = proxy.metrics.breaker
        proxy._current_channels()
        breaker.set(1.0, {"target": "big"})
        proxy._current_channels()
        assert refreshed(told, breaker) == [(1.0, {"target": "big"})]
        proxy.endpoint = endpoint("http://b/v1")
        proxy._current_channels()
        assert told[-1] == (breaker.gauge, 0.0, {"target": "big"})
        assert refreshed(told, breaker) == []
        await proxy.close()

    asyncio.run(scenario())


def test_budgets_are_told_of_without_a_call(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spent share resets at midnight, and is removed with its budget."""

    async def scenario() -> None:
        ledger = LocalLedger()
        share = ledger.metrics.share
        budgets: dict[str, Any] = {"usd_per_day": 10.0, "keys": {"ann": 1.0}}
        await ledger.configure(LedgerSettings.model_validate({"budgets": budgets}))
        now = datetime.now(UTC)
        call = {"target": "small", "prompt_id": "p", "p_correct": {}, "expected_cost_usd": {}, "usage": None}
        await ledger.record(CallRecord(request_id="r", caller="ann", at=now, end="answered", cost_usd=0.5, **call), [])
        assert refreshed(told, share)[-2:] == [(0.5, {"key": key_label("ann")}), (0.05, {"key": "all"})]
        monkeypatch.setattr(module, "_now", lambda: now + timedelta(days=1))
        assert refreshed(told, share)[-2:] == [(0.0, {"key": key_label("ann")}), (0.0, {"key": "all"})]
        await ledger.configure(LedgerSettings.model_validate({"budgets": {"usd_per_day": 10.0}}))
        assert {tags["key"] for _, tags in refreshed(told, share)} == {"all"}

    asyncio.run(scenario())


def test_a_label_does_not_name_who_has_a_key() -> None:
    """It matches the README's command, and no caller's name collides with the label of the sum."""
    shell = subprocess.run(
        "printf %s ann | sha256sum | cut -c1-12", shell=True, capture_output=True, text=True, check=True
    )
    assert key_label("ann") == shell.stdout.strip()
    assert key_label("all") != "all"


def test_the_router_that_serves_is_told_of_and_none_that_did(told: Told, api: Api, router: str, tmp_path: Any) -> None:
    old = Router.load(router)
    new = old.with_pool(old.pool.model_copy(update={"name": "other"}))
    new.save(str(tmp_path / "router"))
    metrics = api.endpoint.metrics
    assert refreshed(told, metrics.router) == [(1.0, {"version": old.version, "role": "router"})]
    assert refreshed(told, metrics.queued_tokens) == [(0, {})]
    api.configure(router=str(tmp_path / "router"))
    assert (metrics.router.gauge, 0.0, {"version": old.version, "role": "router"}) in told
    assert refreshed(told, metrics.router) == [(1.0, {"version": new.version, "role": "router"})]
