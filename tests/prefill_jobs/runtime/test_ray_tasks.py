from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from prefill_jobs.runtime import cluster, ray_tasks
from prefill_router.common.errors import UserError


class Doubler:
    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, x: int) -> int:
        return double(x, self.offset)


def double(x: int, offset: int = 0) -> int:
    if x == 13:
        raise UserError("13 is unlucky")
    if x == 28:
        raise OSError(errno.ENOSPC, "No space left on device")
    return 2 * x + offset


def test_results_come_back_from_tasks(local_ray: None) -> None:
    assert sorted(ray_tasks.map_items(partial(double, offset=1), range(5))) == [1, 3, 5, 7, 9]


def test_results_come_back_from_actors(local_ray: None) -> None:
    resources = cluster.Actors(2).options(1)
    assert sorted(ray_tasks.map_on_actors(partial(Doubler, 1), range(5), **resources)) == [1, 3, 5, 7, 9]


def test_actors_that_are_many_are_handed_several_items_at_a_time() -> None:
    assert ray_tasks.task_size(10**6, 6 * 20) == 1  # few actors: each shard is reported when it is done
    assert ray_tasks.task_size(1000, 6 * 1000) == 1  # few items: none waits for another
    size = ray_tasks.task_size(245_000, 6 * 1000)
    assert size > 1
    assert 245_000 / size >= 8 * 6 * 1000


def test_items_that_go_together_all_come_back(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tasks, "_MAX_IN_FLIGHT", 1)
    monkeypatch.setattr(ray_tasks, "_ROUNDS", 1)
    resources = cluster.Actors(1).options(1)
    assert sorted(ray_tasks.map_on_actors(partial(Doubler, 1), range(5), **resources)) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(("x", "message"), [(13, "13 is unlucky"), (28, "No space left on device")])
def test_what_a_user_can_put_right_in_a_task_is_raised_here(local_ray: None, x: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(ray_tasks.map_items(double, [x]))


@pytest.mark.parametrize("number", [0, 1, 2, 50])
def test_what_is_spread_comes_back_in_order(local_ray: None, number: int) -> None:
    items = range(100, 100 + number)
    assert list(ray_tasks.spread(double, items)) == [2 * x for x in items]


def test_what_is_spread_is_handed_out_as_it_is_taken(local_ray: None) -> None:
    items = iter(range(100, 1000))
    results = ray_tasks.spread(double, items)
    assert next(results) == 200
    assert next(items) <= 100 + 2 * cluster.num_cpus() + 1


@pytest.mark.parametrize(("x", "message"), [(13, "13 is unlucky"), (28, "No space left on device")])
def test_what_a_user_can_put_right_in_what_is_spread_is_raised_here(local_ray: None, x: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(ray_tasks.spread(double, [1, x, 2]))


@dataclass(frozen=True)
class Numbers:
    values: list[int]

    def merge(self, other: Numbers) -> Numbers:
        return Numbers(self.values + other.values)


def numbers(x: int) -> Numbers:
    if x == 13:
        raise UserError("13 is unlucky")
    return Numbers([x])


def sum_up(name: str, merged: Numbers) -> tuple[str, int, NDArray[np.int64]]:
    if sum(merged.values) > 100:
        raise UserError("too much")
    return name, sum(merged.values), np.sort(merged.values)


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_are_merged_by_name_before_they_come_back(local_ray: None, parts: int) -> None:
    items = [(name, start + i) for name, start in (("a", 1), ("b", 10)) for i in range(parts)]
    found = list(ray_tasks.merge_items(items, numbers, sum_up, num_cpus=1))
    for name, total, ordered in found:
        expected = sorted(x for other, x in items if other == name)
        assert total == sum(expected)
        np.testing.assert_array_equal(ordered, expected)
    assert sorted(name for name, _, _ in found) == ["a", "b"]


@pytest.mark.parametrize("others", [[], [1, 2]])
@pytest.mark.parametrize(("x", "message"), [(13, "13 is unlucky"), (101, "too much")])
def test_what_a_user_can_put_right_in_a_part_is_raised_here(
    local_ray: None, x: int, message: str, others: list[int]
) -> None:
    items = [("a", n) for n in [x, *others]] + [("b", 1)]
    with pytest.raises(UserError, match=message):
        list(ray_tasks.merge_items(items, numbers, sum_up))
