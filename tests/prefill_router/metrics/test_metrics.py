from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, roc_auc_score

from prefill_router.common.errors import UserError
from prefill_router.metrics import (
    Scorer,
    auccc,
    best_tolerance,
    brier_score,
    cost_coverage_curve,
    expected_calibration_error,
    pareto_frontier,
    roc_auc,
    score_routing,
    with_fewest_decimals,
)
from prefill_router.metrics.discrimination import TargetScores
from prefill_router.policy.selection import choose

Array = NDArray[np.float64]
Point = tuple[float, float]

GRID = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.625, 1.0])


def naive_points(correct: Array, p: Array, cost: Array, paid: Array) -> list[tuple[float, float, float]]:
    """(tolerance, mean cost, accuracy) of every distinct gap, each from routing all prompts anew."""
    complete = ~np.isnan(correct).any(1)
    paid = np.broadcast_to(paid, p.shape)[complete]
    cost = np.broadcast_to(cost, p.shape)[complete]
    correct, p = correct[complete], p[complete]
    if not len(p):
        return []
    rows = np.arange(len(p))
    result = []
    for tolerance in np.unique(p.max(1, keepdims=True) - p):
        choice = choose(p, cost, tolerance)
        result.append((float(tolerance), float(paid[rows, choice].mean()), float(correct[rows, choice].mean())))
    return result


def naive_frontier(points: Sequence[Point]) -> list[Point]:
    def is_beaten(point: Point) -> bool:
        return any(o[0] <= point[0] and o[1] >= point[1] and o != point for o in points)

    return sorted({point for point in points if not is_beaten(point)})


def naive_auccc(points: Sequence[Point], c_min: float, c_max: float, floor: float) -> float:
    span = c_max - c_min
    if span <= 0:
        return 0.0
    kept = []
    for cost, accuracy in points:
        if abs(cost - c_min) <= 1e-9 * span:
            kept.append((c_min, accuracy))
        elif abs(cost - c_max) <= 1e-9 * span:
            kept.append((c_max, accuracy))
        elif c_min < cost < c_max:
            kept.append((cost, accuracy))
    if not kept:
        return 0.0
    if kept[0][0] > c_min:
        kept.insert(0, (c_min, floor))
    if kept[-1][0] < c_max:
        kept.append((c_max, kept[-1][1]))
    area = 0.0
    for (left, low), (right, high) in pairwise(kept):
        area += (right - left) * ((low - floor) + (high - floor)) / 2
    return area / span


def naive_scores(correct: Array, p: Array, cost: Array, paid: Array, tolerance: float) -> dict[str, float]:
    curve = sorted((c, a) for _, c, a in naive_points(correct, p, cost, paid))
    complete = [i for i in range(len(p)) if not np.isnan(correct[i]).any()]
    expected, real = np.broadcast_to(cost, p.shape), np.broadcast_to(paid, p.shape)
    num_targets = p.shape[1]
    singles = [
        (float(np.mean([real[i, t] for i in complete])), float(np.mean([correct[i, t] for i in complete])))
        for t in range(num_targets)
    ]
    best_accuracy = max(a for _, a in singles)
    best_cost = min(c for c, a in singles if a == best_accuracy)
    (c_min, floor), (c_max, _) = min(singles), max(singles)
    chosen = {i: int(choose(p[[i]], expected[[i]], tolerance)[0]) for i in complete}
    accuracy = float(np.mean([correct[i, t] for i, t in chosen.items()]))
    mean_cost = float(np.mean([real[i, t] for i, t in chosen.items()]))
    oracle = float(np.mean([max(correct[i]) for i in complete]))
    router = naive_auccc(curve, c_min, c_max, floor)
    models = naive_auccc(naive_frontier(singles), c_min, c_max, floor)
    together = naive_auccc(naive_frontier(singles + curve), c_min, c_max, floor)
    reached = [c for c, a in curve if a >= best_accuracy - 1e-12]
    return {
        "num_prompts": len(complete),
        "best_single_accuracy": best_accuracy,
        "best_single_cost": best_cost,
        "oracle_accuracy": oracle,
        "accuracy": accuracy,
        "cost": mean_cost,
        "efficacy": (accuracy - best_accuracy) / (oracle - best_accuracy),
        "cost_saving": 1 - mean_cost / c_max,
        "best_efficacy": (max(a for _, a in curve) - best_accuracy) / (oracle - best_accuracy),
        "saving_at_best_single": 1 - min(reached) / best_cost if reached else float("nan"),
        "p_auccc": router,
        "model_auccc": models,
        "mdp_auccc": router - models,
        "pdp_auccc": together - router,
    }


def random_pool(seed: int, num_prompts: int = 60, missing: float = 0.1) -> tuple[Array, Array, Array, Array]:
    """correct (N, T), p (N, T), cost (T,) and paid (N, T) of four targets; dearer ones are better, p is informative."""
    rng = np.random.default_rng(seed)
    chances = np.clip(rng.random((num_prompts, 1)) + np.array([-0.3, -0.1, 0.1, 0.2]), 0.02, 0.98)
    correct = (rng.random((num_prompts, 4)) < chances).astype(float)
    correct[rng.random((num_prompts, 4)) < missing] = np.nan
    p = np.clip(chances + rng.normal(0, 0.1, chances.shape), 0, 1)
    cost = np.array([0.1, 0.4, 1.5, 4.0])
    return correct, p, cost, cost * rng.uniform(0.5, 2.0, p.shape)


@st.composite
def routings(draw: st.DrawFn, per_prompt: bool) -> tuple[Array, Array, Array]:
    """correct with NaN, p and cost with ties."""
    n, t = draw(st.integers(1, 6)), draw(st.integers(1, 4))

    def matrix(values: st.SearchStrategy[float], size: int) -> Array:
        return np.array(draw(st.lists(values, min_size=size, max_size=size)))

    correct = matrix(st.sampled_from([0.0, 1.0, 1.0, 0.0, 0.5, float("nan")]), n * t).reshape(n, t)
    p = matrix(GRID | st.floats(0, 1), n * t).reshape(n, t)
    return correct, p, matrix(GRID, n * t).reshape(n, t) if per_prompt else matrix(GRID, t)


@pytest.mark.parametrize("per_prompt", [False, True])
@settings(deadline=None)
@given(st.data())
def test_curve_holds_a_routing_for_every_observed_gap(per_prompt: bool, data: st.DataObject) -> None:
    correct, p, cost = data.draw(routings(per_prompt))
    expected = sorted((c, a) for _, c, a in naive_points(correct, p, cost, cost))
    curve = cost_coverage_curve(correct, p, cost)
    assert curve.shape == (len(expected), 2)
    np.testing.assert_allclose(curve, np.array(expected).reshape(-1, 2), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_curve_chooses_by_expected_cost_and_counts_actual_cost(seed: int) -> None:
    correct, p, cost, paid = random_pool(seed)
    expected = sorted((c, a) for _, c, a in naive_points(correct, p, cost, paid))
    np.testing.assert_allclose(cost_coverage_curve(correct, p, cost, paid), expected, rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_curve_is_sorted_by_cost_then_accuracy(seed: int) -> None:
    curve = cost_coverage_curve(*random_pool(seed))
    assert curve.tolist() == sorted(curve.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_points_that_cost_the_same_are_sorted_by_accuracy_however_their_sums_round(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (40, 3)
    correct, p, cost = (rng.random(shape) < 0.6).astype(float), rng.random(shape), rng.random(shape)
    prices = [Fraction(1, 10), Fraction(3, 10), Fraction(7, 10)]
    exact = []
    for tolerance in np.unique(p.max(1, keepdims=True) - p):
        choice = choose(p, cost, tolerance)
        right = int(correct[np.arange(len(p)), choice].sum())
        exact.append((sum((prices[t] for t in choice), Fraction(0)) / len(p), Fraction(right, len(p))))
    expected = np.array(sorted(exact), dtype=float)
    curve = cost_coverage_curve(correct, p, cost, np.array(prices, dtype=float))
    np.testing.assert_allclose(curve, expected, atol=1e-12)


def test_prompts_with_a_missing_outcome_are_left_out_of_the_curve() -> None:
    correct, p, cost, paid = random_pool(7, missing=0.3)
    complete = ~np.isnan(correct).any(1)
    assert 0 < complete.sum() < len(p)
    np.testing.assert_array_equal(
        cost_coverage_curve(correct, p, cost, paid),
        cost_coverage_curve(correct[complete], p[complete], cost, paid[complete]),
    )


def test_curve_of_no_complete_prompt_is_empty() -> None:
    assert cost_coverage_curve([[np.nan, 1.0]], [[0.5, 0.5]], [1.0, 2.0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("curve", "area"),
    [
        pytest.param([(1.0, 0.5), (3.0, 0.9)], 0.2, id="a triangle above the floor"),
        pytest.param([(1.0, 0.7), (2.0, 0.9), (3.0, 0.9)], (0.3 + 0.4) / 2, id="two trapezoids"),
        pytest.param([(2.0, 0.9), (3.0, 0.9)], (0.2 + 0.4) / 2, id="starts right of c_min: from the floor"),
        pytest.param([(1.0, 0.5), (2.0, 0.9)], (0.2 + 0.4) / 2, id="ends left of c_max: keeps its last accuracy"),
        pytest.param([(2.0, 0.9)], (0.2 + 0.4) / 2, id="one point: both"),
        pytest.param([(0.5, 0.2), (1.0, 0.5), (3.0, 0.9), (4.0, 1.0)], 0.2, id="points out of range do not count"),
        pytest.param([(1.0 - 1e-9, 0.7), (3.0 + 1e-9, 0.9)], 0.3, id="within 1e-9 of the range: on its ends"),
        pytest.param([(1.0 + 1e-9, 0.7), (3.0 - 1e-9, 0.9)], 0.3, id="within 1e-9 of the range, inside"),
        pytest.param([(1.0 - 1e-6, 0.7), (3.0, 0.9)], 0.2, id="farther out than that: out"),
        pytest.param([(1.0, 0.3), (3.0, 0.3)], -0.2, id="below the floor"),
        pytest.param([(1.0, 0.5), (1.0, 0.9), (3.0, 0.9)], 0.4, id="a step at c_min"),
        pytest.param([], 0.0, id="empty"),
        pytest.param([(5.0, 0.9)], 0.0, id="nothing in range"),
    ],
)
def test_auccc_by_hand(curve: list[Point], area: float) -> None:
    assert auccc(curve, 1.0, 3.0, 0.5) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("c_max", [2.0, 1.0])
def test_auccc_of_an_empty_range_is_zero(c_max: float) -> None:
    assert auccc([(2.0, 0.9)], 2.0, c_max, 0.5) == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 4), st.floats(0, 1)), max_size=12), st.floats(0, 1))
def test_auccc_is_the_trapezoid_of_the_definition(points: list[Point], floor: float) -> None:
    points.sort()
    assert auccc(points, 1.0, 3.0, floor) == pytest.approx(naive_auccc(points, 1.0, 3.0, floor), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(GRID | st.floats(0, 1), GRID | st.floats(0, 1)), max_size=12))
def test_pareto_frontier_keeps_points_that_no_cheaper_point_matches(points: list[Point]) -> None:
    frontier = pareto_frontier(np.array(points).reshape(-1, 2))
    assert [tuple(point) for point in frontier.tolist()] == naive_frontier(points)


@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize("with_paid", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_scores_match_the_definitions(seed: int, with_paid: bool, per_prompt: bool) -> None:
    correct, p, cost, paid = random_pool(seed)
    if per_prompt:
        cost = cost * np.random.default_rng(seed).uniform(0.5, 2.0, p.shape)
    scores = score_routing(correct, p, cost, 0.1, paid if with_paid else None)
    expected = naive_scores(correct, p, cost, paid if with_paid else cost, 0.1)
    got = {name: getattr(scores, name) for name in expected}
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def test_paid_for_each_target_is_broadcast_like_cost() -> None:
    correct, p, cost, _ = random_pool(3)
    paid = cost * 2.0
    assert score_routing(correct, p, cost, 0.1, paid) == score_routing(
        correct, p, np.broadcast_to(cost, p.shape), 0.1, np.broadcast_to(paid, p.shape)
    )


def test_knowing_the_outcomes_closes_the_gap() -> None:
    correct, _, cost, _ = random_pool(5, missing=0.0)
    scores = score_routing(correct, correct, cost)
    assert scores.accuracy == pytest.approx(scores.oracle_accuracy)
    assert scores.efficacy == pytest.approx(1.0)
    assert scores.mdp_auccc > 0.0
    assert scores.auc == [1.0] * 4


def test_always_the_best_target_closes_nothing() -> None:
    correct, p, cost, _ = random_pool(5, missing=0.0)
    always_best = np.zeros_like(p)
    always_best[:, correct.mean(0).argmax()] = 1.0
    assert score_routing(correct, always_best, cost).efficacy == 0.0


def test_always_the_dearest_target_saves_nothing() -> None:
    correct, p, cost, _ = random_pool(5)
    always_dearest = np.zeros_like(p)
    always_dearest[:, cost.argmax()] = 1.0
    assert score_routing(correct, always_dearest, cost).cost_saving == pytest.approx(0.0, abs=1e-12)


def test_best_single_target_is_the_cheaper_of_two_equally_accurate_ones() -> None:
    scores = score_routing([[1, 0, 0], [0, 1, 0]], [[0.5] * 3] * 2, [3.0, 2.0, 1.0])
    assert (scores.best_single_accuracy, scores.best_single_cost) == (0.5, 2.0)


def test_ratios_without_a_denominator_are_nan() -> None:
    scores = score_routing([[1.0, 0.0], [1.0, 0.0]], [[0.9, 0.1], [0.8, 0.2]], [0.0, 0.0])
    assert np.isnan([scores.efficacy, scores.best_efficacy, scores.cost_saving, scores.saving_at_best_single]).all()


@pytest.mark.parametrize("seed", range(8))
def test_efficacy_is_nan_where_one_target_is_always_best_by_partial_credit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct = rng.random((50, 3)) / 2
    correct[:, 0] = correct.max(1)
    assert np.isnan(score_routing(correct, rng.random((50, 3)), [3.0, 2.0, 1.0]).efficacy)


def test_saving_is_nan_where_the_router_never_reaches_the_best_single_target() -> None:
    correct = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    misled = [[0.2, 0.8], [0.2, 0.8], [0.2, 0.8], [0.8, 0.2]]
    scores = score_routing(correct, misled, [2.0, 1.0])
    assert scores.best_efficacy < 0.0
    assert np.isnan(scores.saving_at_best_single)


def test_scores_of_a_target_count_the_prompts_on_which_it_was_graded() -> None:
    correct, p, cost, _ = random_pool(11, num_prompts=200, missing=0.3)
    scores = score_routing(correct, p, cost)
    for t in range(4):
        graded = ~np.isnan(correct[:, t])
        assert graded.sum() > scores.num_prompts
        y, p_t = correct[graded, t], p[graded, t]
        assert scores.auc[t] == pytest.approx(roc_auc_score(y, p_t), abs=1e-12)
        assert scores.brier[t] == pytest.approx(brier_score_loss(y, p_t), abs=1e-12)
        assert scores.ece[t] == pytest.approx(expected_calibration_error(y, p_t), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), GRID | st.floats(0, 1)), min_size=1, max_size=30))
def test_auc_matches_scikit_learn_ties_included(pairs: list[Point]) -> None:
    y, p = np.array(pairs).T
    if len(set(y)) == 1:
        assert np.isnan(roc_auc(y, p))
    else:
        assert roc_auc(y, p) == pytest.approx(roc_auc_score(y, p), abs=1e-9)


REWARDS = st.sampled_from([0.0, 0.25, 0.5, 0.85, 1.0]) | st.floats(0, 1)


def naive_order(rewards: Array, p: Array, weights: Array) -> float:
    """The weighted share of the pairs with different rewards that `p` orders alike, equal p counting half."""
    ordered = compared = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if rewards[i] > rewards[j]:
                weight = weights[i] * weights[j]
                compared += weight
                ordered += weight * (1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0)
    return ordered / compared if compared else float("nan")


@settings(deadline=None)
@given(st.lists(st.tuples(REWARDS, GRID | st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=20))
def test_auc_of_judged_rewards_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[float, float, int]]) -> None:
    rewards, p, weights = np.array(rows).T
    scores = TargetScores(rewards, p)
    assert roc_auc(rewards, p) == pytest.approx(naive_order(rewards, p, np.ones(len(p))), abs=1e-12, nan_ok=True)
    assert scores.auc(weights[None])[0] == pytest.approx(naive_order(rewards, p, weights), abs=1e-12, nan_ok=True)


@settings(deadline=None)
@given(st.lists(st.tuples(REWARDS, GRID), min_size=1, max_size=20))
def test_auc_depends_on_the_order_of_rewards_alone(pairs: list[Point]) -> None:
    rewards, p = np.array(pairs).T
    ranks = np.unique(rewards, return_inverse=True)[1]
    np.testing.assert_equal(roc_auc(rewards, p), roc_auc(ranks / max(ranks.max(), 1), p))
    assert roc_auc(-ranks, p) == pytest.approx(1.0 - roc_auc(ranks, p), abs=1e-12, nan_ok=True)


def test_scores_of_judged_rewards_by_hand() -> None:
    rewards, p = [0.2, 0.85, 0.85, 1.0], [0.3, 0.3, 0.7, 0.5]
    # Of five pairs with different rewards, one has equal p and one is in the wrong order.
    assert roc_auc(rewards, p) == (3 + 0.5) / 5
    assert expected_calibration_error(rewards, p, bins=2) == pytest.approx((abs(2.05 - 1.1) + 0.15) / 4)
    assert brier_score(rewards, p) == pytest.approx((0.1**2 + 0.55**2 + 0.15**2 + 0.5**2) / 4)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_weighted_gap_of_the_bins(bins: int) -> None:
    rng = np.random.default_rng(bins)
    p = np.concatenate([rng.random(200), [0.0, 1.0]])
    y = (rng.random(202) < p**2).astype(float)
    expected = 0.0
    for b in range(bins):
        inside = (p > b / bins) & (p <= (b + 1) / bins) | ((b == 0) & (p == 0.0))
        if inside.any():
            expected += inside.mean() * abs(y[inside].mean() - p[inside].mean())
    assert expected_calibration_error(y, p, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_without_prompts_is_nan() -> None:
    assert np.isnan(expected_calibration_error([], []))


@pytest.mark.parametrize("seed", range(6))
def test_best_tolerance_follows_the_one_standard_error_rule(seed: int) -> None:
    correct, p, cost, paid = random_pool(seed, num_prompts=80)
    points = naive_points(correct, p, cost, paid)
    complete = ~np.isnan(correct).any(1)
    highest, best_single = max(a for _, _, a in points), correct[complete].mean(0).max()
    enough = highest - (highest * (1 - highest) / complete.sum()) ** 0.5
    if highest >= best_single:
        enough = max(enough, best_single)
    cheapest = min(c for _, c, a in points if a >= enough - 1e-12)
    tolerance = best_tolerance(correct, p, cost, paid)
    at = max((point for point in points if point[0] <= tolerance), key=lambda point: point[0])
    assert at[1] == pytest.approx(cheapest, rel=1e-12)
    assert len(repr(tolerance)) < len(repr(at[0]))


def test_best_tolerance_of_judged_rewards_uses_their_own_spread() -> None:
    rewards = np.tile([[0.75, 0.7], [0.85, 0.7]], (50, 1))  # means 0.8 and 0.7; a standard error is 0.005
    p, cost = np.tile([0.8, 0.7], (100, 1)), [2.0, 1.0]
    assert best_tolerance(rewards, p, cost) == 0.0
    assert best_tolerance((rewards > 0.8).astype(float), p, cost) == 0.0
    noisy = np.tile([[0.0, 0.7], [1.0, 0.7], [1.0, 0.7]], (1, 1))  # mean 0.67, a standard error is 0.27
    assert best_tolerance(noisy, p[:3], cost) == 0.101  # the gap is a little over 0.1, in float64


@pytest.mark.parametrize(
    ("tolerances", "expected"),
    [
        ([0.0, 0.5], 0.0),
        ([0.02, 0.5], 0.02),
        ([0.0201234, 0.5], 0.021),
        ([0.0201234, 0.0209], 0.0202),
        ([0.0201234, 0.0201235], 0.0201234),
        ([0.8 - 0.7, np.nextafter(0.8 - 0.7, 1.0)], 0.8 - 0.7),
        ([0.9994], 1.0),
    ],
)
def test_a_tolerance_is_written_with_the_fewest_decimals_that_choose_the_same(
    tolerances: list[float], expected: float
) -> None:
    assert with_fewest_decimals(tolerances, 0) == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_tolerance_that_reaches_an_accuracy_chooses_as_the_point_of_the_curve(seed: int) -> None:
    correct, p, cost, paid = random_pool(seed, num_prompts=80)
    scorer = Scorer(correct, p, cost, paid=paid)
    for _, _, accuracy in scorer.curve():
        tolerance = scorer.tolerance_reaching(accuracy)
        assert tolerance is not None
        scores = score_routing(correct, p, cost, tolerance, paid)
        assert scores.accuracy >= accuracy - 1e-12
        assert scores.cost == pytest.approx(min(c for _, c, a in scorer.curve() if a >= accuracy - 1e-12), rel=1e-12)


def test_best_tolerance_without_a_complete_prompt_is_zero() -> None:
    assert best_tolerance([[np.nan, 1.0]], [[0.5, 0.5]], [1.0, 2.0]) == 0.0


def test_scoring_without_a_complete_prompt_is_an_error() -> None:
    with pytest.raises(UserError, match="no prompt has an outcome for every target"):
        score_routing([[np.nan, 1.0], [0.0, np.nan]], [[0.5, 0.5]] * 2, [1.0, 2.0])


@pytest.mark.parametrize("metric", [score_routing, cost_coverage_curve, best_tolerance])
@pytest.mark.parametrize(
    ("correct", "p", "message"),
    [
        ([[1.0, 0.0]], [[0.5, 0.5, 0.5]], r"correct \(1, 2\) and p \(1, 3\) must both be"),
        ([1.0, 0.0], [0.5, 0.5], r"correct \(2,\) and p \(2,\) must both be"),
        ([[1.0, 0.0]], [[0.5, np.nan]], "p must not be NaN"),
    ],
)
def test_predictions_of_another_shape_or_nan_are_errors(metric: Any, correct: Any, p: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(correct, p, [1.0, 2.0])
