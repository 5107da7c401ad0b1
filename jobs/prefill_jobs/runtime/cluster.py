"""How jobs meet Ray: joining or starting it, sizing encoder actors, and getting users' errors back out of it."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import pickle
import shutil
import sys
import tempfile
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefill_jobs.runtime import local_ray, ray_failures
from prefill_router.common.addresses import ray_address, require_listener, token_refused
from prefill_router.common.console import said_if_slow, silent_stderr
from prefill_router.common.errors import UserError

_FEW_AHEAD = 128  # tasks at once, of some twenty actors, that no driver is too slow for
_ROUNDS = 8  # so many times as many tasks there are at least, for at the end all wait for the last

_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
_ANSWERS_KEPT = 1000  # of a shared object: no call is made again after so many others

T = TypeVar("T")
R = TypeVar("R")


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray on this machine; nothing where Ray already runs."""
    if not ray.is_initialized():
        local_ray.set_environment()
        if address := ray_address():
            _join(address)
        else:
            with local_ray.private(), silent_stderr():
                ray.init("local", include_dashboard=False, **_QUIET)  # nobody would know where the dashboard is
    ray_failures.listen()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _join(address: str) -> None:
    """Joins a cluster. Raises UserError if it cannot be reached or refuses the token, and says if it takes long."""
    if ":" in address and "://" not in address:
        require_listener(address, "RAY_ADDRESS")  # or Ray would try for a minute without a word
        _require_token(address)
    try:
        with said_if_slow(f"ray: still trying to join the cluster at {address}"), silent_stderr():
            ray.init(address, **_QUIET)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS = {address}: {error}: the job must run on one of the cluster's nodes, and RAY_AUTH_TOKEN be "
            "the cluster's, where it wants one; from elsewhere use prefill-router submit"
        ) from None


def _require_token(address: str) -> None:
    """Raises UserError where the cluster refuses our token: `ray.init` would try for 20 s and not say why."""
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        with said_if_slow(f"ray: waiting for an answer from {address}"), silent_stderr():
            GcsClient(address=address)
    except AuthenticationError:
        raise token_refused(address) from None
    except RpcError as error:
        raise UserError(f"RAY_ADDRESS = {address}: no Ray cluster answers there ({error})") from None


@contextmanager
def results_apart() -> Iterator[None]:
    """Keeps stdout for a job's result: what Ray prints goes to stderr. A Ray that the job starts ends here too.

    Where the job fails, that Ray ends with the process: the error is told first, which what ends Ray may not outlive.
    """
    is_ours = not ray.is_initialized()
    with redirect_stdout(sys.stderr), ray_failures.in_one_line():
        yield
        if is_ours and ray.is_initialized():
            ray.shutdown()


@contextmanager
def connected() -> Iterator[None]:
    """Connects for a job that prints a result: see `connect` and `results_apart`."""
    with results_apart():
        connect()
        yield


def map_rows(items: Sequence[Mapping[str, Any]], function: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Maps items (flat dicts) on Ray Data and yields the rows that come back, as they finish.

    Each is a task of its own, that can go wherever there is room. Only where many actors work on many items, some go
    together: the driver takes in a few hundred tasks a second, which a thousand actors would wait for.

    `function` takes and returns a dict, or is a class of actors that do; `options` are those of `Dataset.map`.
    A UserError inside it is raised here, and so is an OSError, such as a full disk, as one.
    """
    guarded = _guarded_class(function) if isinstance(function, type) else functools.partial(_guarded, function)
    pool = options.get("compute")
    ahead = pool.max_size * pool.max_tasks_in_flight_per_actor if pool is not None else 1
    yield from _rows(_items(items, task_size(len(items), ahead)).map(guarded, **options))


def task_size(num_items: int, num_ahead: int) -> int:
    """How many items make a task where `num_ahead` tasks are handed out at once: each actor still gets many."""
    return max(1, min(num_ahead // _FEW_AHEAD, num_items // (_ROUNDS * num_ahead)))


def spread(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """As `map`, in order: each call is a task somewhere in the cluster, twice as many at once as there are CPUs.

    A single item's is made here. Raises a UserError, or an OSError as one, of any call.
    """
    left = iter(items)
    first = list(itertools.islice(left, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    task = ray.remote(_caught)
    calls = deque(task.remote(function, item) for item in (*first, *itertools.islice(left, 2 * num_cpus() - 2)))
    while calls:
        result, problem = ray.get(calls.popleft())
        if problem is not None:
            raise UserError(problem)
        calls.extend(task.remote(function, item) for item in itertools.islice(left, 1))
        yield result


def merge_rows(
    items: Sequence[Mapping[str, Any]],
    by: str,
    function: Callable[[dict[str, Any]], Any],
    finish: Callable[[str, Any], dict[str, Any]],
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Maps items as `map_rows` does, but to objects with a method `merge`, whose order does not matter.

    Those of items that agree in `by` are merged where they lie in the cluster; what `finish` makes of `by` and their
    merge is a row that is yielded. Where no two items agree, that is one task.
    """
    names = {item[by] for item in items}
    if len(names) == len(items):
        alone = functools.partial(_guarded, lambda item: finish(item[by], function(item)))
        yield from _rows(_items(items).map(alone, **options))
    else:
        parts = _items(items).map(functools.partial(_part, by, function), **options)
        groups = parts.groupby(by, num_partitions=len(names))  # by default some hundreds, most of them of nothing
        yield from _rows(groups.map_groups(functools.partial(_merged, by, finish), **options))


def _items(items: Sequence[Mapping[str, Any]], task_size: int = 1) -> ray.data.Dataset:
    return ray.data.from_items([dict(item) for item in items], override_num_blocks=-(-len(items) // task_size))


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in dataset.iter_rows():
        if _ERROR in row:
            raise UserError(row[_ERROR])
        yield row


def _part(by: str, function: Callable[[dict[str, Any]], Any], item: dict[str, Any]) -> dict[str, Any]:
    found = _guarded(lambda item: {_PART: function(item)}, item)
    return {by: item[by], _PART: found.get(_PART, found)}


def _merged(by: str, finish: Callable[[str, Any], dict[str, Any]], group: dict[str, Any]) -> dict[str, Any]:
    parts = list(group[_PART])
    problem = next((part for part in parts if isinstance(part, dict)), None)
    row = problem or _guarded(lambda _: finish(group[by][0], functools.reduce(lambda a, b: a.merge(b), parts)), {})
    return {name: [value] for name, value in row.items()}


# Ray loses the cause of an exception on its way to the driver, so that what a user can put right travels as a row.
_ERROR = "_user_error"
_PART = "_part"


def _guarded(function: Callable[..., dict[str, Any]], row: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    try:
        return function(row, **arguments)
    except (UserError, OSError) as error:
        return {_ERROR: str(error)}


def _guarded_class(worker: type) -> type:
    class Guarded(worker):  # type: ignore[misc]
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return _guarded(super().__call__, row)

    Guarded.__name__ = worker.__name__
    return Guarded


def _nodes() -> list[str]:
    """Ids of the nodes that are alive."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _total(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Actors:
    """How many encoder actors a job wants, and of what shape."""

    most: int | None = None  # as many as the cluster has room for when the job begins
    gpus: float = 1.0  # of each, where there are any
    accelerator: str | None = None  # which GPUs; actors wait for them where the cluster has none yet
    memory_gib: float | None = None  # that Ray keeps for each

    @property
    def use_gpus(self) -> bool:
        return self.accelerator is not None or _total("GPU") >= self.gpus

    @property
    def number(self) -> int:
        """By the cluster's GPUs now, or one a node that has none."""
        if self.most is not None:
            return self.most
        if self.use_gpus:
            return max(1, int(_total("GPU") // self.gpus))
        return len(_nodes())

    def options(self, calls: int) -> dict[str, Any]:
        """Options of `Dataset.map` for up to so many actors, with `calls` items at a time each.

        The first actor is enough to begin; the others join as the cluster has or gets room for them. Each is handed few
        items ahead, so that nothing heaps up before a slow one.
        """
        number = self.number
        there = int(_total("GPU") // self.gpus) if self.use_gpus else number
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


class Shared:
    """An object that all workers of a job call, in a process of its own on the driver's node.

    Workers come and go with their nodes; what they share stays as long as the driver. Where its process is ended, as by
    Ray when memory runs out, another goes on: from the beginning, or, if `is_kept`, from where it was, with each call
    made once. What is kept is written with every call, so that it must be small.
    """

    def __init__(self, kind: type, *arguments: Any, is_kept: bool = False) -> None:
        place = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0)(_Object)
        options = {"scheduling_strategy": place, "max_restarts": -1, "max_task_retries": -1}
        folder = tempfile.mkdtemp(prefix="prefill-router-") if is_kept else None
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._actor = actor.options(**options).remote(kind, arguments, folder)

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the object and waits for what it returns."""
        return ray.get(self._actor.call.remote(uuid.uuid4().hex, method, *arguments))

    async def call_async(self, method: str, *arguments: Any) -> Any:
        """Calls a method as `call` does, without blocking the event loop."""
        return await self._actor.call.remote(uuid.uuid4().hex, method, *arguments)


class _Object:
    """The process of a shared object. If there is a folder, it lies there, with its latest answers."""

    def __init__(self, kind: type, arguments: tuple[Any, ...], folder: str | None) -> None:
        self._file = Path(folder, "object.pickle") if folder else None
        is_restart = self._file is not None and self._file.exists()
        self._object, self._answers = self._load() if is_restart else (kind(*arguments), OrderedDict())

    def _load(self) -> tuple[Any, OrderedDict[str, Any]]:
        assert self._file is not None
        return pickle.loads(self._file.read_bytes())  # type: ignore[no-any-return]

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """What a call returned is returned again where Ray makes it again."""
        if self._file is None:
            return getattr(self._object, method)(*arguments)
        if name not in self._answers:
            self._answers[name] = getattr(self._object, method)(*arguments)
            if len(self._answers) > _ANSWERS_KEPT:
                self._answers.popitem(last=False)
            draft = self._file.with_suffix(".draft")
            draft.write_bytes(pickle.dumps((self._object, self._answers)))
            draft.replace(self._file)
        return self._answers[name]


def worker_id() -> str:
    """Identifies the actor that asks among those of its job."""
    return ray.get_runtime_context().get_actor_id() or ""


def on_every_node(function: Callable[..., None], *arguments: Any) -> None:
    """Runs a function once on each machine of the cluster, and waits. A single machine has no need of it."""
    nodes = _nodes()
    if len(nodes) < 2:
        return
    task = ray.remote(num_cpus=0)(_caught)
    affinities = (NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes)
    calls = [task.options(scheduling_strategy=place).remote(function, *arguments) for place in affinities]
    for _, problem in ray.get(calls):
        if problem is not None:
            raise UserError(problem)


def _caught(function: Callable[..., R], *arguments: Any) -> tuple[R | None, str | None]:
    """What it returns, or what a user can put right."""
    try:
        return function(*arguments), None
    except (UserError, OSError) as error:
        return None, str(error)


def cpus_per_worker(workers: int) -> float:
    """The CPUs that one of `workers` equal actors asks of Ray.

    Some CPU always stays free: a pool of actors that takes every one starves the tasks that should feed it.
    """
    share = max(1.0, _total("CPU")) / workers
    return int(share - 1) if share >= 2 else share / 2


def threads_per_worker(workers: int) -> int:
    """Torch threads of one of `workers` equal actors, so that together they fill the cores and no more."""
    return max(1, min(os.cpu_count() or 1, int(_total("CPU") // workers)))


def task_resources() -> dict[str, Any]:
    """Options of `Dataset.map` for tasks that read and compute: a CPU each and, where there are any, a quarter GPU."""
    return {"num_cpus": 1, "num_gpus": 0.25} if _total("GPU") else {"num_cpus": 1}


def num_cpus() -> int:
    return max(1, int(_total("CPU")))


def num_gpus() -> int:
    return int(_total("GPU"))


def caller_resources(workers: int, calls_per_worker: int) -> dict[str, Any]:
    """Options of `Dataset.map` for actors that wait for others, and hardly need a CPU."""
    strategy = ray.data.ActorPoolStrategy(
        size=workers,
        max_tasks_in_flight_per_actor=2 * calls_per_worker,
        max_concurrent_calls_per_actor=calls_per_worker,
    )
    return {"compute": strategy, "num_cpus": 0.1}
