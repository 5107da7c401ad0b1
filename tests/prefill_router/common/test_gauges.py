"""One thread sets unchanged gauges again; gauges of garbage-collected objects are not set."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest

from prefill_router.common.gauges import REFRESHER, KeptGauge, Refresher
from serving import wait_until


class FakeGauge:
    """Records each call of `set`."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((value, tags))


@pytest.fixture
def gauge() -> FakeGauge:
    return FakeGauge()


def test_each_of_its_values_is_set_again(gauge: FakeGauge) -> None:
    refresher = Refresher(3600.0)
    kept = KeptGauge(gauge, refresher)
    kept.set(1.0, {"target": "a"})
    kept.set(2.0, {"target": "b"})
    kept.set(3.0, {"target": "a"})
    gauge.calls.clear()
    refresher.refresh()
    assert gauge.calls == [(3.0, {"target": "a"}), (2.0, {"target": "b"})]


def test_a_value_that_is_forgotten_ends_at_0(gauge: FakeGauge) -> None:
    refresher = Refresher(3600.0)
    kept = KeptGauge(gauge, refresher)
    kept.set(1.0, {"target": "a"})
    kept.forget({"target": "a"})
    kept.forget({"target": "never set"})
    refresher.refresh()
    assert gauge.calls == [(1.0, {"target": "a"}), (0.0, {"target": "a"})]


def test_a_garbage_collected_gauge_is_not_set(gauge: FakeGauge) -> None:
    refresher = Refresher(3600.0)
    kept = KeptGauge(gauge, refresher)
    kept.set(1.0)
    del kept
    gc.collect()
    gauge.calls.clear()
    refresher.refresh()
    assert gauge.calls == []


def test_a_failing_method_is_logged_and_the_others_still_run(
    gauge: FakeGauge, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def tell(self) -> None:
            raise ValueError("no value")

    refresher, broken = Refresher(3600.0), Broken()
    refresher.add(broken.tell)
    kept = KeptGauge(gauge, refresher)
    kept.set(1.0)
    with caplog.at_level(logging.ERROR):
        refresher.refresh()
    assert gauge.calls == [(1.0, {}), (1.0, {})]
    assert "no value" in caplog.text


def test_the_thread_refreshes_repeatedly(gauge: FakeGauge) -> None:
    refresher = Refresher(0.001)
    kept = KeptGauge(gauge, refresher)
    kept.set(1.0)
    wait_until(lambda: len(gauge.calls) > 3, "set again", 30)


def test_all_gauges_of_a_process_share_one_thread(gauge: FakeGauge) -> None:
    def threads() -> list[Any]:
        return [thread for thread in threading.enumerate() if thread is REFRESHER._thread]

    kept = [KeptGauge(gauge), KeptGauge(FakeGauge())]
    assert len(kept) == 2
    assert len(threads()) == 1
