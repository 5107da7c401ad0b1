"""Maps typed functions and actors over items on Ray, and raises a task's UserError in the driver.

Ray loses the cause of an exception on its way to the driver. A task therefore returns its result together with the
message of a UserError or OSError, such as a full disk, and the driver raises the message as a UserError.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefill_jobs.runtime import cluster
from prefill_router.common.errors import UserError

_MAX_IN_FLIGHT = 128  # tasks, those of some twenty actors, with which every driver keeps up
_ROUNDS = 8  # minimum number of tasks per task in flight: at the end, all actors wait for the last task

_NAME, _ITEM, _PART, _RESULT = "name", "item", "part", "result"  # columns of datasets; items and results are pickled


class Mergeable(Protocol):
    """A partial result. Merging is associative and commutative."""

    def merge(self, other: Self, /) -> Self: ...


T = TypeVar("T")
R = TypeVar("R")
M = TypeVar("M", bound=Mergeable)


@dataclass(frozen=True)
class Outcome:
    """The result of a call, or the message of the user's error that it raised."""

    result: Any = None
    problem: str | None = None

    def get(self) -> Any:
        """The result. Raises UserError if the call failed."""
        if self.problem is not None:
            raise UserError(self.problem)
        return self.result


def attempt(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Calls a function and catches a user's error."""
    try:
        return Outcome(function(*arguments))
    except (UserError, OSError) as error:
        return Outcome(problem=str(error))


def map_items(function: Callable[[T], R], items: Sequence[T], **resources: Any) -> Iterator[R]:
    """Calls `function` on each item in a task of its own, and yields the results as they finish.

    `resources` are options of `Dataset.map`. Raises the UserError of any call.
    """
    rows = [{_ITEM: pickle.dumps(item)} for item in items]
    yield from _results(_dataset(rows).map(functools.partial(_call, function), **resources))


def map_on_actors(
    create: Callable[[], Callable[[T], R]], items: Sequence[T], *, compute: Any, **resources: Any
) -> Iterator[R]:
    """Calls actors, each built by `create`, on items, and yields the results as they finish.

    An item is a task of its own, unless many actors work on many items: the driver handles only a few hundred tasks per
    second. `compute` and `resources` are options of `Dataset.map`. Raises the UserError of any call.
    """
    rows = [{_ITEM: pickle.dumps(item)} for item in items]
    size = task_size(len(items), compute.max_size * compute.max_tasks_in_flight_per_actor)
    actor: Any = type(getattr(create, "func", create).__name__, (_Actor,), {})  # Ray's dashboard shows the name
    arguments = {"create": create}
    yield from _results(_dataset(rows, size).map(actor, fn_constructor_kwargs=arguments, compute=compute, **resources))


def task_size(num_items: int, num_in_flight: int) -> int:
    """The number of items per task with `num_in_flight` tasks at a time, such that each actor still gets many tasks."""
    return max(1, min(num_in_flight // _MAX_IN_FLIGHT, num_items // (_ROUNDS * num_in_flight)))


def merge_items(
    items: Sequence[tuple[str, T]], function: Callable[[T], M], finish: Callable[[str, M], R], **resources: Any
) -> Iterator[R]:
    """Calls `function` on named items, merges the results of equal names, and yields what `finish` makes of each merge.

    Results are merged in the cluster. If all names differ, each item is one task. `resources` are options of
    `Dataset.map`. Raises the UserError of any call.
    """
    rows = [{_NAME: name, _ITEM: pickle.dumps(item)} for name, item in items]
    names = {name for name, _ in items}
    if len(names) == len(items):
        yield from _results(_dataset(rows).map(functools.partial(_finish_one, function, finish), **resources))
    else:
        parts = _dataset(rows).map(functools.partial(_part, function), **resources)
        groups = parts.groupby(_NAME, num_partitions=len(names))  # the default is hundreds of mostly empty partitions
        yield from _results(groups.map_groups(functools.partial(_finish_group, finish), **resources))


def spread(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Like `map`, in order, with twice as many tasks in flight as the cluster has CPUs.

    A single item is mapped in this process. Raises the UserError of any call.
    """
    left = iter(items)
    first = list(itertools.islice(left, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    task = ray.remote(attempt)
    start = itertools.islice(left, 2 * cluster.num_cpus() - 2)
    calls = deque(task.remote(function, item) for item in (*first, *start))
    while calls:
        result = ray.get(calls.popleft()).get()
        calls.extend(task.remote(function, item) for item in itertools.islice(left, 1))
        yield result


def run_on_every_node(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function once on each node of a cluster and waits. Does nothing on a single machine."""
    nodes = cluster.nodes()
    if len(nodes) < 2:
        return
    task = ray.remote(num_cpus=0)(attempt)
    places = (NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes)
    for outcome in ray.get([task.options(scheduling_strategy=p).remote(function, *arguments) for p in places]):
        outcome.get()


def _dataset(rows: Sequence[dict[str, Any]], task_size: int = 1) -> ray.data.Dataset:
    return ray.data.from_items(list(rows), override_num_blocks=-(-len(rows) // task_size))


def _results(dataset: ray.data.Dataset) -> Iterator[Any]:
    for row in dataset.iter_rows():
        yield pickle.loads(row[_RESULT]).get()


def _call(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    return {_RESULT: pickle.dumps(attempt(function, pickle.loads(row[_ITEM])))}


class _Actor:
    def __init__(self, create: Callable[[], Callable[[Any], Any]]) -> None:
        self.worker = create()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _call(self.worker, row)


def _finish_one(
    function: Callable[[Any], Any], finish: Callable[[str, Any], Any], row: dict[str, Any]
) -> dict[str, Any]:
    return _call(lambda item: finish(row[_NAME], function(item)), row)


def _part(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    return {_NAME: row[_NAME], _PART: attempt(function, pickle.loads(row[_ITEM]))}


def _finish_group(finish: Callable[[str, Any], Any], group: dict[str, Any]) -> dict[str, Any]:
    def merged() -> Any:
        return finish(group[_NAME][0], functools.reduce(lambda a, b: a.merge(b), [part.get() for part in group[_PART]]))

    return {_RESULT: [pickle.dumps(attempt(merged))]}
