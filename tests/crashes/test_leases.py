"""Leases whose holders die at any moment."""

from __future__ import annotations

from typing import Any

from crashes.enumeration import Machines, Scenario, crash_everywhere
from prefill_router import storage
from prefill_router.storage import lease
from prefill_router.storage.lease import Lease


class Holding(Scenario):
    """Acquires and releases a lease that others have held before."""

    def run(self) -> None:
        for job in ("extract", "label"):
            with Lease.acquire(self.out, job) as held:
                held.check()

    def result(self) -> Any:
        [number] = storage.list_names(storage.join(self.out, "_lease"))
        holder = lease._read(self.out, int(number.removesuffix(".json")))
        return holder.job, holder.released


def test_a_lease_is_free_as_soon_as_its_holder_is_dead(machines: Machines) -> None:
    assert crash_everywhere(machines, Holding, second_crashes=5) >= 8
