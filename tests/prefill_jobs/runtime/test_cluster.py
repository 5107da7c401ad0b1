from __future__ import annotations

import pytest

from prefill_jobs.runtime import cluster
from prefill_router.common.errors import UserError


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_never_take_every_cpu_and_never_more_threads_than_cores(local_ray: None, workers: int) -> None:
    assert workers * cluster.cpus_per_worker(workers) < 4
    assert cluster.cpus_per_worker(workers) > 0
    assert 1 <= cluster.threads_per_worker(workers) * workers <= max(4, workers)


@pytest.mark.parametrize(
    ("by_node", "gpus", "number"), [([2.0, 2.0], 1.0, 4), ([2.0], 0.5, 4), ([3.0, 3.0], 2.0, 2), ([1.0, 4.0], 4.0, 1)]
)
def test_an_actor_has_all_its_gpus_on_one_node(
    monkeypatch: pytest.MonkeyPatch, by_node: list[float], gpus: float, number: int
) -> None:
    monkeypatch.setattr(cluster, "_gpus_by_node", lambda: by_node)
    actors = cluster.Actors(gpus=gpus)
    options = actors.options(calls=3)
    assert (actors.number, options["num_gpus"]) == (number, gpus)
    assert options["compute"].initial_size == number


@pytest.mark.parametrize("by_node", [[], [1.0, 1.0]])
def test_several_gpus_that_no_node_has_are_an_error(monkeypatch: pytest.MonkeyPatch, by_node: list[float]) -> None:
    monkeypatch.setattr(cluster, "_gpus_by_node", lambda: by_node)
    with pytest.raises(UserError, match=r"gpus_per_worker = 2: no node of the cluster has so many GPUs: give a"):
        cluster.Actors(most=1, gpus=2.0).options(calls=3)
    assert cluster.Actors(gpus=2.0, accelerator="H100").use_gpus  # waits for them


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception for it."""

    def too_slow(*_arguments: object, **_options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", too_slow)
    said = r"^Ray failed the job: .* timed out during startup\..*run the job again"
    with pytest.raises(UserError, match=said), cluster.connected():
        pytest.fail("there is no Ray")
