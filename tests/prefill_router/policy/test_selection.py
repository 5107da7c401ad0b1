from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.policy.selection import NO_TARGET, choose

Array = NDArray[np.float64]

GRID = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])


class Case(NamedTuple):
    p: Array
    cost: Array
    tolerance: float
    allowed: NDArray[np.bool_] | None
    max_cost: float | None
    min_p: float | None


@st.composite
def cases(draw: st.DrawFn, constrained: bool = True) -> Case:
    """Prompts with values on a coarse grid, which gives many ties, and between its points."""
    n, t = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    values = GRID | st.floats(0, 1)

    def array(shape: tuple[int, ...], elements: st.SearchStrategy[Any]) -> NDArray[Any]:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(elements, min_size=size, max_size=size))).reshape(shape)

    shapes = st.sampled_from([(t,), (n, t)])
    case = Case(array((n, t), values).astype(float), array(draw(shapes), values), draw(values), None, None, None)
    if not constrained:
        return case
    return case._replace(
        allowed=draw(st.none() | shapes.map(lambda shape: array(shape, st.booleans()).astype(bool))),
        max_cost=draw(st.none() | values),
        min_p=draw(st.none() | values),
    )


def eligible_targets(case: Case, i: int) -> list[int]:
    """Returns the targets that meet the constraints for prompt i, at any tolerance."""
    shape = case.p.shape
    cost = np.broadcast_to(case.cost, shape)
    allowed = np.broadcast_to(True if case.allowed is None else case.allowed, shape)
    return [
        t
        for t in range(shape[1])
        if allowed[i, t]
        and (case.max_cost is None or cost[i, t] <= case.max_cost)
        and (case.min_p is None or case.p[i, t] >= case.min_p)
    ]


def chosen_cost(case: Case) -> Array:
    """Returns the cost of each choice (N,); NaN if there is none."""
    choice = choose(*case)
    cost = np.broadcast_to(case.cost, case.p.shape)
    return np.array([np.nan if t == NO_TARGET else cost[i, t] for i, t in enumerate(choice)])


@settings(deadline=None)
@given(cases())
def test_the_cheapest_that_is_good_enough_ties_to_the_higher_p_then_the_pool_order(case: Case) -> None:
    choice = choose(*case)
    assert choice.shape == (len(case.p),)
    cost = np.broadcast_to(case.cost, case.p.shape)
    for i, chosen in enumerate(choice):
        left = eligible_targets(case, i)
        if not left:
            assert chosen == NO_TARGET
            continue
        highest = max(case.p[i, t] for t in left)
        enough = [t for t in left if highest - case.p[i, t] <= case.tolerance]
        assert chosen == min(enough, key=lambda t: (cost[i, t], -case.p[i, t], t))


@settings(deadline=None)
@given(cases())
def test_constraints_hold_and_minus_one_iff_nothing_is_eligible(case: Case) -> None:
    for i, chosen in enumerate(choose(*case)):
        left = eligible_targets(case, i)
        assert chosen in left if left else chosen == -1


@settings(deadline=None)
@given(cases(), GRID | st.floats(0, 1))
def test_a_larger_tolerance_never_chooses_a_dearer_target(case: Case, more: float) -> None:
    dearer = chosen_cost(case._replace(tolerance=case.tolerance + more)) > chosen_cost(case)
    assert not dearer.any()


@settings(deadline=None)
@given(cases(constrained=False), st.integers(0, 3), st.floats(0, 1))
def test_a_cheaper_target_never_costs_more(case: Case, target: int, factor: float) -> None:
    cost = case.cost.copy()
    cost[..., target % cost.shape[-1]] *= factor
    assert (chosen_cost(case._replace(cost=cost)) <= chosen_cost(case)).all()


@pytest.mark.parametrize(
    ("p", "cost", "chosen"),
    [
        ([0.6, 0.9, 0.9], [1.0, 2.0, 2.0], 1),
        ([0.6, 0.8, 0.9], [1.0, 2.0, 2.0], 2),
        ([0.85, 0.8, 0.9], [2.0, 1.0, 3.0], 1),
        ([0.9, 0.85, 0.1], [1.0, 1.0, 0.0], 0),
    ],
)
def test_choices_by_hand(p: list[float], cost: list[float], chosen: int) -> None:
    assert choose([p], cost, tolerance=0.11).tolist() == [chosen]


def test_rounding_never_drops_a_target_at_its_own_gap() -> None:
    rng = np.random.default_rng(0)
    p = rng.random((500, 2))
    cheap = p.argmin(1)
    cost = np.where(np.arange(2) == cheap[:, None], 1.0, 2.0)
    for i in range(len(p)):
        assert choose(p[[i]], cost[[i]], p[i].max() - p[i].min()) == cheap[i]


def test_the_best_p_is_that_of_the_targets_that_remain() -> None:
    assert choose([[0.9, 0.5, 0.45]], [3.0, 2.0, 1.0], tolerance=0.1, allowed=[False, True, True]).tolist() == [2]
    assert choose([[0.9, 0.5, 0.45]], [3.0, 2.0, 1.0], tolerance=0.1, max_cost=2.5).tolist() == [2]


def test_constraints_include_their_bounds() -> None:
    assert choose([[0.5, 0.9]], [1.0, 2.0], max_cost=1.0, min_p=0.5).tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": [0.5, 0.5]}, r"p has shape \(2,\), must be \(prompts, targets\)"),
        ({"cost": [1.0, 2.0, 3.0]}, r"cost has shape \(3,\), must be \(2,\) or \(1, 2\)"),
        ({"cost": [[1.0], [2.0]]}, r"cost has shape \(2, 1\)"),
        ({"allowed": [True]}, r"allowed has shape \(1,\), must be \(2,\) or \(1, 2\)"),
        ({"p": [[0.5, float("nan")]]}, "must not be NaN"),
        ({"cost": [1.0, float("nan")]}, "must not be NaN"),
        ({"tolerance": -0.1}, "tolerance = -0.1, must be >= 0"),
        ({"tolerance": float("nan")}, "tolerance = nan, must be >= 0"),
    ],
)
def test_bad_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**{"p": [[0.5, 0.6]], "cost": [1.0, 2.0], **arguments})


def test_a_target_that_takes_longer_is_not_eligible_and_one_of_unknown_time_is() -> None:
    p, cost = np.array([[0.9, 0.8, 0.7]]), np.array([3.0, 2.0, 1.0])
    latency = np.array([5.0, 2.0, np.nan])
    chosen = [choose(p, cost, 0.0, latency=latency, max_latency=limit).item() for limit in (None, 5.0, 4.9, 1.9)]
    assert chosen == [0, 0, 1, 2]
    assert choose(p, cost, 0.0, latency=[5.0, 2.0, 3.0], max_latency=1.0).item() == NO_TARGET
