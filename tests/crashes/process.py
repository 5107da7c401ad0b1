"""Makes each life look like a process of its own, though all run in the test process."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Self

import pytest

from crashes.life import here
from prefill_jobs.label import estimation
from prefill_router.corpus import plan, reader, scan
from prefill_router.storage import lease, uris


def simulate(patch: pytest.MonkeyPatch) -> None:
    """Makes runs reproducible until `patch` is undone: random names repeat, and a lease's holder dies with its life.

    Leases are not renewed and reads are not concurrent, so that the moments always come in the same order.
    """
    rng = random.Random(0)
    patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=rng.getrandbits(128), version=4))
    patch.setattr(lease, "_started", lambda _pid: life.number if (life := here()) is not None else 0)
    patch.setattr(lease.Lease, "_keep", lambda _self: None)
    patch.setattr(os, "fsync", lambda _descriptor: None)  # only the process dies, not the machine
    for module in (uris, reader, scan, plan, estimation):
        patch.setattr(module, "ThreadPoolExecutor", _OneThread)


class _OneThread:
    """A thread pool that runs everything in the calling thread."""

    def __init__(self, _num_threads: int | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done = Future[Any]()
        done.set_result(function(*arguments))
        return done
