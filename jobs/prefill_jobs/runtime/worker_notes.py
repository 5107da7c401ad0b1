"""Short notes of workers, which the driver shows while it waits for them. They go through Ray's key-value store."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from prefill_router.common.console import doing

_NAMESPACE = b"prefill_router"


@dataclass(frozen=True)
class WorkerNote:
    """The latest note. No failure to write or to read one fails a job; outside Ray there are none."""

    key: bytes = field(default_factory=lambda: uuid.uuid4().bytes)

    def write(self, text: str) -> None:
        with suppress(RayError):
            if ray.is_initialized():
                _internal_kv_put(self.key, text.encode(), namespace=_NAMESPACE)

    def read(self) -> str | None:
        with suppress(RayError):
            if ray.is_initialized() and (found := _internal_kv_get(self.key, namespace=_NAMESPACE)):
                return found.decode()
        return None

    def remove(self) -> None:
        with suppress(RayError):
            if ray.is_initialized():
                _internal_kv_del(self.key, namespace=_NAMESPACE)

    @contextmanager
    def shown(self, task: str, start: str) -> Iterator[None]:
        """Shows the note while the block runs, and `start` before the first one. Removes it afterwards."""
        started = time.monotonic()
        with doing(lambda: f"{task}: {self.read() or start} ({time.monotonic() - started:.0f} s)"):
            yield
        self.remove()
