"""Joins or starts Ray, and sizes actors and tasks by the cluster's resources."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError

from prefill_jobs.runtime import local_ray, ray_failures
from prefill_router.common.addresses import ray_address, require_listener, token_refused
from prefill_router.common.console import doing, silent_stderr
from prefill_router.common.errors import UserError

_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


def connect() -> None:
    """Joins the cluster at RAY_ADDRESS, or starts Ray on this machine. Does nothing if Ray is initialized."""
    for name in ("ray.data", "ray.train", "ray.widgets"):  # the last one asks notebooks to install widgets
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        local_ray.set_environment()
        if address := ray_address():
            _join(address)
        else:
            with doing("ray: starting on this machine"), local_ray.private(), silent_stderr():
                ray.init("local", include_dashboard=False, **_QUIET)  # its address would not be shown
    ray_failures.listen()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _join(address: str) -> None:
    """Joins a cluster, and says so. Raises UserError if it is unreachable or refuses the token."""
    if ":" in address and "://" not in address:
        require_listener(address, "RAY_ADDRESS")  # Ray would retry silently for a minute
        _require_token(address)
    try:
        with doing(f"ray: joining the cluster at {address}"), silent_stderr():
            ray.init(address, **_QUIET)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS = {address}: {error}: run the job on one of the cluster's nodes, with its RAY_AUTH_TOKEN "
            "if it requires one, or use prefill-router submit"
        ) from None


def _require_token(address: str) -> None:
    """Raises UserError if the cluster refuses the token. `ray.init` would retry for 20 s and give no reason."""
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        with doing(f"ray: waiting for an answer from {address}"), silent_stderr():
            GcsClient(address=address)
    except AuthenticationError:
        raise token_refused(address) from None
    except RpcError as error:
        raise UserError(
            f"RAY_ADDRESS = {address}: no Ray cluster answers ({error}): check the address and that Ray runs"
        ) from None


@contextmanager
def result_on_stdout() -> Iterator[None]:
    """Reserves stdout for a job's result: Ray's output goes to stderr. Shuts down a Ray that the job started.

    After a failure, that Ray ends with the process instead, because shutting it down could end the process before the
    error is reported.
    """
    is_own = not ray.is_initialized()
    with redirect_stdout(sys.stderr), ray_failures.as_user_errors():
        yield
        if is_own and ray.is_initialized():
            with doing("ray: stopping"):
                ray.shutdown()


@contextmanager
def connected() -> Iterator[None]:
    """Connects for a job that prints a result: see `connect` and `result_on_stdout`."""
    with result_on_stdout():
        connect()
        yield


def nodes() -> list[str]:
    """The ids of the live nodes."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _total(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))  # type: ignore[no-untyped-call]


def _gpus_by_node() -> list[float]:
    return [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Actors:
    """The number and the resources of a job's encoder actors."""

    most: int | None = None  # maximum number; by default the cluster's room when the job starts
    gpus: float = 1.0  # per actor, if the cluster has GPUs
    accelerator: str | None = None  # GPU model; actors wait until the cluster has it
    memory_gib: float | None = None  # reserved per actor

    @property
    def use_gpus(self) -> bool:
        """Raises UserError if an actor needs several GPUs, and no node has as many."""
        if self.accelerator is None and self.gpus > 1 and not self._room:
            raise UserError(
                f"gpus_per_worker = {self.gpus:g}: no node of the cluster has so many GPUs: give a smaller number, or "
                "an accelerator to wait for nodes"
            )
        return self.accelerator is not None or self._room > 0

    @property
    def _room(self) -> int:
        """The number of actors for which the nodes have GPUs now."""
        return sum(int(gpus // self.gpus) for gpus in _gpus_by_node())

    @property
    def number(self) -> int:
        """`most`, or the number that the cluster's GPUs allow now, or one per node without GPUs."""
        if self.most is not None:
            return self.most
        if self.use_gpus:
            return max(1, self._room)
        return len(nodes())

    def options(self, calls: int) -> dict[str, Any]:
        """Options of `Dataset.map` for these actors, each with `calls` concurrent items.

        Work starts with the first actor; others join as the cluster has room. Few items are queued per actor, so that
        none wait for a slow one.
        """
        number = self.number
        there = self._room if self.use_gpus else number
        options: dict[str, Any] = {
            "compute": ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=number,
                initial_size=min(number, max(1, there)),
                max_tasks_in_flight_per_actor=2 * calls,
                max_concurrent_calls_per_actor=calls,
            )
        }
        if self.use_gpus:
            options["num_gpus"] = self.gpus
        else:
            options["num_cpus"] = cpus_per_worker(number)
        if self.accelerator is not None:
            options["accelerator_type"] = self.accelerator
        if self.memory_gib is not None:
            options["memory"] = int(self.memory_gib * 2**30)
        return options


def worker_id() -> str:
    """The id of the calling actor."""
    return ray.get_runtime_context().get_actor_id() or ""


def cpus_per_worker(workers: int) -> float:
    """The CPUs that Ray reserves for each of `workers` equal actors.

    Some CPU always stays free: actors that reserve all CPUs starve the tasks that feed them.
    """
    share = max(1.0, _total("CPU")) / workers
    return int(share - 1) if share >= 2 else share / 2


def threads_per_worker(workers: int) -> int:
    """Torch threads of each of `workers` equal actors, which together use every core once."""
    return max(1, min(os.cpu_count() or 1, int(_total("CPU") // workers)))


def task_resources() -> dict[str, Any]:
    """Options of `Dataset.map` for tasks that read and compute: one CPU and, if there are GPUs, a quarter GPU."""
    return {"num_cpus": 1, "num_gpus": 0.25} if _total("GPU") else {"num_cpus": 1}


def num_cpus() -> int:
    return max(1, int(_total("CPU")))


def num_gpus() -> int:
    return int(_total("GPU"))


def caller_resources(workers: int, calls_per_worker: int) -> dict[str, Any]:
    """Options of `Dataset.map` for actors that wait for network calls and need little CPU."""
    strategy = ray.data.ActorPoolStrategy(
        size=workers,
        max_tasks_in_flight_per_actor=2 * calls_per_worker,
        max_concurrent_calls_per_actor=calls_per_worker,
    )
    return {"compute": strategy, "num_cpus": 0.1}
