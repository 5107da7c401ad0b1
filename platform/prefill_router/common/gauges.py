"""Gauges that stay exported while nothing happens: one thread of a process sets all of them again.

Ray's exporter forgets a gauge that was not set for two of its reports, 20 s, and an alert on it falls silent.
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
    """As Ray's gauge."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


class Refresher:
    """Calls methods every `every_s` seconds, in a thread that begins with the first."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._methods: list[WeakMethod[Callable[[], None]]] = []
        self._adding = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, method: Callable[[], None]) -> None:
        """Calls a bound method from now on, as long as its object lives."""
        with self._adding:
            self._methods = [kept for kept in self._methods if kept() is not None] + [WeakMethod(method)]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)
                self._thread.start()

    def refresh(self) -> None:
        """Calls all of them once. One that fails is logged, and keeps no other from being called."""
        for kept in self._methods:
            if (method := kept()) is not None:
                try:
                    method()
                except Exception:
                    log.exception("a gauge could not be set")
            del method  # or its object would live as long as the thread

    def _run(self) -> None:
        while True:
            time.sleep(self._every_s)
            self.refresh()


REFRESHER = Refresher(5.0)  # of this process


class KeptGauge:
    """A gauge whose values are set again as long as this object lives."""

    def __init__(self, gauge: Settable, refresher: Refresher = REFRESHER) -> None:
        self.gauge = gauge
        self._values: dict[frozenset[tuple[str, str]], float] = {}
        self._setting = threading.Lock()  # no old value comes after a new one
        refresher.add(self.refresh)

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        tags = tags or {}
        with self._setting:
            self._values[frozenset(tags.items())] = value
            self.gauge.set(value, dict(tags))

    def forget(self, tags: Mapping[str, str]) -> None:
        """Sets a value to 0 for the last time."""
        with self._setting:
            if self._values.pop(frozenset(tags.items()), None) is not None:
                self.gauge.set(0.0, dict(tags))

    def refresh(self) -> None:
        with self._setting:
            for tags, value in self._values.items():
                self.gauge.set(value, dict(tags))
