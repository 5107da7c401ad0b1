"""Metrics that platform/METHOD.md does not define, each against a slow reference implementation of its source."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.metrics import (
    Scorer,
    agreement_zones,
    arena_score,
    average_improvement_in_quality,
    average_performance_gap_recovered,
    bootstrap_weights,
    brier_score,
    call_performance_threshold,
    completeness_weights,
    interval,
    risk_coverage_curve,
    routing_shares,
    score_routing,
)
from prefill_router.policy.selection import choose

Array = NDArray[np.float64]
Point = tuple[float, float]

OUTCOME = st.sampled_from([0.0, 1.0, 1.0, 0.0, 0.5])
GRID = st.integers(0, 4).map(lambda i: i / 4)


def pool(seed: int, num_prompts: int = 80, num_targets: int = 4, missing: float = 0.0) -> tuple[Array, ...]:
    """correct, p, cost and paid, each (N, T); dearer targets are better, and some p are equal."""
    rng = np.random.default_rng(seed)
    chances = np.clip(rng.random((num_prompts, 1)) + np.linspace(-0.3, 0.2, num_targets), 0.02, 0.98)
    correct = (rng.random(chances.shape) < chances).astype(float)
    correct[rng.random(chances.shape) < missing] = np.nan
    p = np.clip(chances + rng.normal(0, 0.1, chances.shape), 0, 1).round(2)
    cost = np.geomspace(0.0001, 0.004, num_targets) * rng.uniform(0.5, 2.0, chances.shape)
    return correct, p, cost, cost * rng.uniform(0.5, 2.0, chances.shape)


# --- weightings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_of_weight_three_counts_as_three_prompts(seed: int) -> None:
    data = pool(seed, missing=0.1)
    counts = np.random.default_rng(seed).integers(0, 4, len(data[0]))
    repeated = [np.repeat(values, counts, axis=0) for values in data]
    others = ("aurc",)  # its coverages count prompts, not weights
    # Comparison targets depend on the weights alone, metrics of one target on the draw alone.
    figures = Scorer(*data[:3], 0.05, data[3], weights=counts).figures(np.ones((1, len(counts))))
    drawn = Scorer(*data[:3], 0.05, data[3]).figures(counts[None].astype(float))
    figures |= {name: drawn[name] for name in ("accuracy", "cost", "oracle_accuracy", "auc", "ece", "brier")}
    weighted = {name: values[0].tolist() for name, values in figures.items()}
    expected = vars(score_routing(*repeated[:3], 0.05, repeated[3]))
    for name in weighted.keys() - {*others}:
        assert weighted[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12, nan_ok=True), name


def test_comparison_targets_are_chosen_on_all_prompts_in_every_draw() -> None:
    correct, p, cost, paid = pool(0, num_prompts=60)
    weights = bootstrap_weights(60, 40, seed=1).astype(float)
    scorer = Scorer(correct, p, cost, 0.1, paid)
    best, dearest = correct.mean(0).argmax(), paid.mean(0).argmax()
    curve = scorer.curve()
    costs, accuracies = scorer.points_at(curve[:, 0], weights)
    _, most = scorer.points_at([curve[np.lexsort((curve[:, 1], -curve[:, 2]))[0], 0]], weights)
    figures = scorer.figures(weights)
    means = {name: weights @ values / 60 for name, values in (("correct", correct), ("paid", paid))}
    assert len(set(means["correct"].argmax(1))) > 1, "every draw has the same best target, so the test checks nothing"
    is_enough = accuracies >= means["correct"][:, [best]] - 1e-12
    gains = {
        "best_single_accuracy": means["correct"][:, best],
        "best_single_cost": means["paid"][:, best],
        "cost_saving": 1.0 - figures["cost"] / means["paid"][:, dearest],
        "saving_at_best_single": 1.0 - np.where(is_enough, costs, np.inf).min(1) / means["paid"][:, best],
        "best_efficacy": (most[:, 0] - means["correct"][:, best])
        / (figures["oracle_accuracy"] - means["correct"][:, best]),
    }
    for name, expected in gains.items():
        expected = np.where(np.isfinite(expected), expected, np.nan)
        np.testing.assert_allclose(figures[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_batch_of_weightings_scores_as_each_alone() -> None:
    correct, p, cost, paid = pool(1, num_prompts=300, missing=0.05)
    scorer, weights = Scorer(correct, p, cost, 0.1, paid), bootstrap_weights(300, 7, seed=3)
    together = scorer.figures(weights)
    for i, weighting in enumerate(weights):
        for name, values in scorer.figures(weighting[None]).items():
            np.testing.assert_allclose(together[name][i], values[0], rtol=1e-12, err_msg=name)


def test_points_at_other_tolerances_match_their_scores() -> None:
    correct, p, cost, paid = pool(2, missing=0.1)
    scorer, ones = Scorer(correct, p, cost, 0.0, paid), np.ones((1, len(p)))
    tolerances = (0.0, 0.03, 0.2, 1.0)
    scores = [score_routing(correct, p, cost, tolerance, paid) for tolerance in tolerances]
    costs, accuracies = scorer.points_at(tolerances, ones)
    np.testing.assert_allclose(costs[0], [s.cost for s in scores], rtol=1e-12)
    np.testing.assert_allclose(accuracies[0], [s.accuracy for s in scores], rtol=1e-12)


# --- missing outcomes ----------------------------------------------------------------------------------------------


def test_completeness_weights_remove_the_bias_of_outcomes_missing_on_hard_prompts() -> None:
    rng = np.random.default_rng(0)
    num_prompts = 40_000
    ease = rng.random((num_prompts, 1))
    correct = (rng.random((num_prompts, 2)) < ease).astype(float)
    seen = correct.copy()
    seen[rng.random(num_prompts) < 0.9 * (1 - ease[:, 0]), 1] = np.nan
    p, cost = np.repeat(ease, 2, axis=1), [1.0, 2.0]
    truth = score_routing(correct, p, cost).accuracy
    assert score_routing(seen, p, cost).accuracy > truth + 0.1
    weights = completeness_weights(seen, ease[:, 0], num_strata=20)
    assert score_routing(seen, p, cost, weights=weights).accuracy == pytest.approx(truth, abs=0.015)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), GRID), min_size=1, max_size=40), st.integers(1, 6))
def test_completeness_weights_sum_to_the_number_of_prompts(prompts: list[tuple[bool, float]], num_strata: int) -> None:
    has_all, difficulty = np.array([done for done, _ in prompts]), [value for _, value in prompts]
    correct = np.where(has_all[:, None], 1.0, [[np.nan, 1.0]])
    weights = completeness_weights(correct, difficulty, num_strata)
    assert (weights[~has_all] == 0).all()
    assert weights.sum() == pytest.approx(len(prompts) if has_all.any() else 0.0)
    assert (weights[has_all] >= 1.0 - 1e-12).all()


def test_without_missing_outcomes_all_prompts_weigh_one() -> None:
    np.testing.assert_array_equal(completeness_weights(np.ones((17, 3)), np.arange(17.0)), np.ones(17))


# --- RouteLLM, RouterBench, RouterArena ------------------------------------------------------------------------------


def naive_gap_curve(strong: Array, weak: Array, score: Array) -> list[Point]:
    """(share of calls to the strong target, share of the gap recovered) at every threshold."""
    gap = strong.mean() - weak.mean()
    points = [(0.0, 0.0)]
    for threshold in sorted(set(score.tolist()), reverse=True):
        calls = score >= threshold
        accuracy = np.where(calls, strong, weak).mean()
        points.append((calls.mean(), (accuracy - weak.mean()) / gap))
    return points


@pytest.mark.parametrize("seed", range(6))
def test_gap_recovered_matches_every_threshold(seed: int) -> None:
    correct, p, _, _ = pool(seed)
    strong, weak, score = correct[:, 3], correct[:, 0], (p[:, 3] - p[:, 0]).round(1)
    points = naive_gap_curve(strong, weak, score)
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(points))
    assert average_performance_gap_recovered(strong, weak, score) == pytest.approx(area, abs=1e-9)
    for recovered in (0.5, 0.8):
        least = min(calls for calls, gap in points if gap >= recovered - 1e-12)
        assert call_performance_threshold(strong, weak, score, recovered) == pytest.approx(least, abs=1e-9)


def test_gap_recovered_is_nan_if_the_strong_target_is_not_better() -> None:
    assert math.isnan(average_performance_gap_recovered([0, 1], [1, 0], [0.5, 0.1]))
    assert math.isnan(call_performance_threshold([0, 0], [1, 0], [0.5, 0.1], 0.5))


def naive_aiq(curve: list[Point], c_min: float, c_max: float) -> float:
    """The mean accuracy of the hull, computed as the best mixture of any two points at each corner."""

    def best(cost: float) -> float:
        values = [a for c, a in curve if c <= cost]
        for (c1, a1), (c2, a2) in ((x, y) for x in curve for y in curve if x[0] < cost < y[0]):
            values.append(a1 + (a2 - a1) * (cost - c1) / (c2 - c1))
        return max(values)

    # The hull is linear between these costs, so the trapezoid is exact.
    corners = sorted({c_min, c_max, *(c for c, _ in curve if c_min < c < c_max)})
    area = sum((right - left) * (best(left) + best(right)) / 2 for left, right in pairwise(corners))
    return area / (c_max - c_min)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), GRID | st.floats(0, 1)), min_size=1, max_size=8))
def test_improvement_in_quality_is_the_mean_of_the_best_mixtures(points: list[tuple[int, float]]) -> None:
    curve = [(1.0, 0.1), *((1.0 + cost / 10, accuracy) for cost, accuracy in points)]
    assert average_improvement_in_quality(curve, 1.0, 3.0) == pytest.approx(naive_aiq(curve, 1.0, 3.0), abs=1e-9)


def test_improvement_in_quality_of_no_range_or_no_curve() -> None:
    assert average_improvement_in_quality([(1.0, 0.5)], 1.0, 1.0) == 0.0
    assert math.isnan(average_improvement_in_quality([], 1.0, 2.0))


def test_arena_score_by_hand() -> None:
    cheapness = math.log2(200 / 1.0) / math.log2(200 / 0.0044)
    assert arena_score(0.7, 0.001) == pytest.approx(1.1 * 0.7 * cheapness / (0.1 * 0.7 + cheapness), abs=1e-12)
    assert arena_score(0.7, 0.0044e-3) == pytest.approx(1.1 * 0.7 / 1.07)
    assert arena_score(0.7, 0.2) == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(arena_score(0.7, 0.0))


# --- choices -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(OUTCOME, GRID), min_size=1, max_size=20))
def test_risk_is_the_share_of_errors_among_the_most_confident(prompts: list[Point]) -> None:
    correct, confidence = np.array(prompts).T
    expected = []
    for least in sorted(set(confidence.tolist()), reverse=True):
        covered = confidence >= least
        expected.append((covered.mean(), 1.0 - correct[covered].mean()))
    np.testing.assert_allclose(risk_coverage_curve(correct, confidence), expected, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), GRID), min_size=1, max_size=12))
def test_aurc_is_the_mean_risk_over_coverages_whatever_the_order_of_ties(prompts: list[Point]) -> None:
    correct, confidence = np.array(prompts).T
    order = np.argsort(-confidence, kind="stable")
    wrong = 1.0 - correct[order]
    expected = []
    for k in range(1, len(wrong) + 1):  # ties cut by k contribute their mean
        edge = confidence[order][k - 1]
        sure, tied = confidence[order] > edge, confidence[order] == edge
        expected.append((wrong[sure].sum() + (k - sure.sum()) * wrong[tied].mean()) / k)
    p = np.column_stack([confidence, np.full(len(confidence), -1.0)])
    outcomes = np.column_stack([correct, np.zeros(len(correct))])
    assert score_routing(outcomes, p, [1.0, 2.0]).aurc == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_zones_and_shares_are_counts(seed: int) -> None:
    correct, p, cost, _ = pool(seed, missing=0.1)
    choice = choose(p, cost, 0.1)
    complete = [i for i in range(len(p)) if not np.isnan(correct[i]).any()]
    right = [i for i in complete if correct[i].min() == 1.0]
    wrong = [i for i in complete if correct[i].max() == 0.0]
    mixed = [i for i in complete if correct[i].max() > correct[i].min()]
    zones, n = agreement_zones(correct, choice), len(complete)
    assert (zones.all_right, zones.disagree, zones.all_wrong) == pytest.approx(
        (len(right) / n, len(mixed) / n, len(wrong) / n)
    )
    assert zones.wrong_choices == pytest.approx(np.mean([correct[i, choice[i]] == 0.0 for i in mixed]))
    scores = score_routing(correct, p, cost, 0.1)
    assert (scores.all_right, scores.disagree, scores.all_wrong, scores.wrong_choices) == pytest.approx(
        (zones.all_right, zones.disagree, zones.all_wrong, zones.wrong_choices), abs=1e-9
    )
    assert scores.share == pytest.approx([np.mean([choice[i] == t for i in complete]) for t in range(4)])


def test_a_prompt_without_a_target_counts_as_wrong_if_some_target_was_right() -> None:
    assert agreement_zones([[1.0, 0.0], [1.0, 1.0]], [-1, -1]).wrong_choices == 1.0


def test_zones_of_no_complete_prompt_are_nan() -> None:
    zones = agreement_zones([[1.0, np.nan]], [0])
    assert np.isnan([zones.all_right, zones.disagree, zones.all_wrong, zones.wrong_choices]).all()


def test_shares_leave_out_prompts_without_a_target() -> None:
    np.testing.assert_allclose(routing_shares([0, 2, -1, 2], 3), [0.25, 0.0, 0.5])


# --- degenerate pools ----------------------------------------------------------------------------------------------


def test_a_pool_of_one_target_adds_nothing_by_routing() -> None:
    scores = score_routing([[1.0], [0.0]], [[0.7], [0.3]], [2.0])
    assert (scores.accuracy, scores.oracle_accuracy, scores.best_single_accuracy, scores.share) == (
        0.5,
        0.5,
        0.5,
        [1.0],
    )
    assert (scores.p_auccc, scores.mdp_auccc, scores.pdp_auccc, scores.disagree) == (0.0, 0.0, 0.0, 0.0)
    assert np.isnan([scores.efficacy, scores.apgr, scores.cpt_50, scores.wrong_choices]).all()


def test_targets_of_equal_cost_have_no_area() -> None:
    correct, p, _, _ = pool(3)
    scores = score_routing(correct, p, [1.0] * 4)
    assert (scores.p_auccc, scores.model_auccc, scores.aiq, scores.cost_saving) == (0.0, 0.0, 0.0, 0.0)
    assert scores.accuracy == pytest.approx(correct[np.arange(len(p)), p.argmax(1)].mean())


def test_brier_score_without_prompts_is_nan() -> None:
    assert math.isnan(brier_score([], []))
    assert brier_score([1.0, 0.0], [0.75, 0.25]) == 0.0625


# --- the bootstrap -------------------------------------------------------------------------------------------------


def test_a_draw_takes_as_many_prompts_as_there_are() -> None:
    weights = bootstrap_weights(50, 200, seed=1)
    assert weights.shape == (200, 50)
    assert (weights.sum(1) == 50).all()
    assert weights.mean(0) == pytest.approx(np.ones(50), abs=0.3)
    np.testing.assert_array_equal(weights, bootstrap_weights(50, 200, seed=1))


def test_prompts_of_a_cluster_are_drawn_together() -> None:
    weights = bootstrap_weights(6, 40, clusters=["a", "b", "a", "c", "b", "a"])
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_four_copies_of_each_prompt_double_the_interval() -> None:
    values = np.repeat(np.random.default_rng(0).random(200), 4)
    alone, together = (
        interval(values.mean(), bootstrap_weights(800, 2000, clusters=clusters) @ values / 800)
        for clusters in (None, np.arange(800) // 4)
    )
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(2.0, rel=0.15)


def test_an_interval_spans_the_central_percentiles_of_the_draws() -> None:
    assert interval(0.5, np.arange(1, 40)) == pytest.approx((0.5, 1.0, 39.0))
    assert interval(0.5, np.arange(1, 80)) == pytest.approx((0.5, 2.0, 78.0))
    assert interval(0.5, [0.2, np.nan, 0.4], level=1.0)[1:] == (0.2, 0.4)
    assert np.isnan(interval(np.nan, [0.1, 0.2])).all()
    assert np.isnan(interval(0.1, [np.nan])[1:]).all()
