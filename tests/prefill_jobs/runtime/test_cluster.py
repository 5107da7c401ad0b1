from __future__ import annotations

import pytest

from prefill_jobs.runtime import cluster


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_never_take_every_cpu_and_never_more_threads_than_cores(local_ray: None, workers: int) -> None:
    assert workers * cluster.cpus_per_worker(workers) < 4
    assert cluster.cpus_per_worker(workers) > 0
    assert 1 <= cluster.threads_per_worker(workers) * workers <= max(4, workers)
