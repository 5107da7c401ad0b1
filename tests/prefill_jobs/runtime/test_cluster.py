from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from prefill_jobs.runtime import cluster
from prefill_router.common.errors import UserError


class Doubler:
    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return double(row, self.offset)


def double(row: dict[str, Any], offset: int) -> dict[str, Any]:
    if row["x"] == 13:
        raise UserError("13 is unlucky")
    if row["x"] == 28:
        raise OSError(errno.ENOSPC, "No space left on device")
    return {"y": 2 * row["x"] + offset}


def test_rows_come_back_from_tasks(local_ray: None) -> None:
    rows = cluster.map_rows([{"x": x} for x in range(5)], double, fn_kwargs={"offset": 1})
    assert sorted(row["y"] for row in rows) == [1, 3, 5, 7, 9]


def test_rows_come_back_from_actors(local_ray: None) -> None:
    resources = cluster.Actors(2).options(1)
    rows = cluster.map_rows([{"x": x} for x in range(5)], Doubler, fn_constructor_kwargs={"offset": 1}, **resources)
    assert sorted(row["y"] for row in rows) == [1, 3, 5, 7, 9]


def test_actors_that_are_many_are_handed_several_items_at_a_time() -> None:
    assert cluster.task_size(10**6, 6 * 20) == 1  # few actors: each shard is reported when it is done
    assert cluster.task_size(1000, 6 * 1000) == 1  # few items: none waits for another
    size = cluster.task_size(245_000, 6 * 1000)
    assert size > 1
    assert 245_000 / size >= 8 * 6 * 1000


def test_items_that_go_together_all_come_back(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_FEW_AHEAD", 1)
    monkeypatch.setattr(cluster, "_ROUNDS", 1)
    resources = cluster.Actors(1).options(1)
    rows = cluster.map_rows([{"x": x} for x in range(5)], Doubler, fn_constructor_kwargs={"offset": 1}, **resources)
    assert sorted(row["y"] for row in rows) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(("x", "message"), [(13, "13 is unlucky"), (28, "No space left on device")])
def test_what_a_user_can_put_right_in_a_task_is_raised_here(local_ray: None, x: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(cluster.map_rows([{"x": x}], double, fn_kwargs={"offset": 0}))


def doubled(x: int) -> int:
    return int(double({"x": x}, 0)["y"])


@pytest.mark.parametrize("number", [0, 1, 2, 50])
def test_what_is_spread_comes_back_in_order(local_ray: None, number: int) -> None:
    items = range(100, 100 + number)
    assert list(cluster.spread(doubled, items)) == [2 * x for x in items]


def test_what_is_spread_is_handed_out_as_it_is_taken(local_ray: None) -> None:
    items = iter(range(100, 1000))
    results = cluster.spread(doubled, items)
    assert next(results) == 200
    assert next(items) <= 100 + 2 * cluster.num_cpus() + 1


@pytest.mark.parametrize(("x", "message"), [(13, "13 is unlucky"), (28, "No space left on device")])
def test_what_a_user_can_put_right_in_what_is_spread_is_raised_here(local_ray: None, x: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(cluster.spread(doubled, [1, x, 2]))


@dataclass(frozen=True)
class Numbers:
    values: list[int]

    def merge(self, other: Numbers) -> Numbers:
        return Numbers(self.values + other.values)


def numbers(item: dict[str, Any]) -> Numbers:
    if item["x"] == 13:
        raise UserError("13 is unlucky")
    return Numbers([item["x"]])


def sum_up(name: str, merged: Numbers) -> dict[str, Any]:
    if sum(merged.values) > 100:
        raise UserError("too much")
    return {"name": name, "total": sum(merged.values), "sorted": np.sort(merged.values)}


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_are_merged_by_name_before_they_come_back(local_ray: None, parts: int) -> None:
    items = [{"name": name, "x": start + i} for name, start in (("a", 1), ("b", 10)) for i in range(parts)]
    rows = {row["name"]: row for row in cluster.merge_rows(items, "name", numbers, sum_up, num_cpus=1)}
    for name in "ab":
        expected = sorted(item["x"] for item in items if item["name"] == name)
        assert rows[name]["total"] == sum(expected)
        np.testing.assert_array_equal(rows[name]["sorted"], expected)
    assert len(rows) == 2


@pytest.mark.parametrize("others", [[], [1, 2]])
@pytest.mark.parametrize(("x", "message"), [(13, "13 is unlucky"), (101, "too much")])
def test_what_a_user_can_put_right_in_a_part_is_raised_here(
    local_ray: None, x: int, message: str, others: list[int]
) -> None:
    items = [{"name": "a", "x": n} for n in [x, *others]] + [{"name": "b", "x": 1}]
    with pytest.raises(UserError, match=message):
        list(cluster.merge_rows(items, "name", numbers, sum_up))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_never_take_every_cpu_and_never_more_threads_than_cores(local_ray: None, workers: int) -> None:
    assert workers * cluster.cpus_per_worker(workers) < 4
    assert cluster.cpus_per_worker(workers) > 0
    assert 1 <= cluster.threads_per_worker(workers) * workers <= max(4, workers)
