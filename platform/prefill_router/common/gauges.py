"""Gauges that stay exported while they do not change: one thread per process sets them all again every 5 s.

Ray's exporter drops a gauge that is not set for two of its reports (20 s), and alerts on it stop firing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol
from weakref import WeakMethod

log = logging.getLogger(__name__)


class Settable(Protocol):
    """The interface of Ray's gauge."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


class Refresher:
    """Calls methods every `every_s` seconds, in a thread that starts with the first `add`."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._methods: list[WeakMethod[Callable[[], None]]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, method: Callable[[], None]) -> None:
        """Calls a bound method periodically until its object is garbage-collected."""
        with self._lock:
            self._methods = [ref for ref in self._methods if ref() is not None] + [WeakMethod(method)]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)
                self._thread.start()

    def refresh(self) -> None:
        """Calls every method once. Logs a failure and continues with the next method."""
        for ref in self._methods:
            if (method := ref()) is not None:
                try:
                    method()
                except Exception:
                    log.exception("cannot refresh a gauge")
            del method  # a reference here would keep its object alive while the thread sleeps

    def _run(self) -> None:
        while True:
            time.sleep(self._every_s)
            self.refresh()


REFRESHER = Refresher(5.0)  # one per process


class KeptGauge:
    """A gauge whose values are set again periodically while this object lives."""

    def __init__(self, gauge: Settable, refresher: Refresher = REFRESHER) -> None:
        self.gauge = gauge
        self._values: dict[frozenset[tuple[str, str]], float] = {}
        self._lock = threading.Lock()  # a refresh must not overwrite a newer value
        refresher.add(self.refresh)

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Sets a value. One that is set already is left to the next refresh, as setting it costs."""
        tags = tags or {}
        key = frozenset(tags.items())
        with self._lock:
            if self._values.get(key) != value:
                self._values[key] = value
                self.gauge.set(value, dict(tags))

    def forget(self, tags: Mapping[str, str]) -> None:
        """Sets a value to 0 and stops refreshing it."""
        with self._lock:
            if self._values.pop(frozenset(tags.items()), None) is not None:
                self.gauge.set(0.0, dict(tags))

    def refresh(self) -> None:
        with self._lock:
            for tags, value in self._values.items():
                self.gauge.set(value, dict(tags))
