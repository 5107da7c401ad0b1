from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.evaluation.contenders import Contender, HeldOut, evaluate, oracle, scoring
from prefill_router.evaluation.results import HEADLINES, Evaluation
from prefill_router.metrics import cost_coverage_curve, score_routing
from prefill_router.policy.pool import Pool, Target

POOL = Pool(
    name="three",
    targets=(
        Target(name="large", input_price=2.0, output_price=8.0),
        Target(name="medium", input_price=0.5, output_price=2.0),
        Target(name="small", input_price=0.1, output_price=0.4),
    ),
)


def trial(num_prompts: int = 80, seed: int = 0, missing: float = 0.1) -> tuple[HeldOut, Contender, Contender]:
    """Prompts with three targets, the dearer ones better, some outcomes missing; a router and a worse baseline."""
    rng = np.random.default_rng(seed)
    shape = (num_prompts, 3)
    chances = rng.random((num_prompts, 1)) + np.array([0.3, 0.1, -0.1]) + rng.normal(0, 0.3, shape)
    chances = np.clip(chances, 0.02, 0.98)
    correct = (rng.random(shape) < chances).astype(np.float32)
    output_tokens = rng.integers(5, 400, shape).astype(np.float32)
    output_tokens[rng.random(shape) < missing] = np.nan
    gone = rng.random(shape) < missing
    correct[gone] = output_tokens[gone] = np.nan
    expected = rng.uniform(50, 300, shape)
    router, baseline = (
        Contender(name, name, np.clip(chances + rng.normal(0, noise, shape), 0, 1), expected, tolerance)
        for name, noise, tolerance in (("router", 0.1, 0.1), ("guess", 0.3, 0.0))
    )
    return HeldOut(rng.integers(10, 300, num_prompts), correct, output_tokens), router, baseline


def evaluated(*arguments: Any, **options: Any) -> Evaluation:
    held_out, router, *baselines = arguments
    return evaluate(POOL, "v1", held_out, router, baselines, num_draws=40, **options)


def naive_cost(data: HeldOut, lengths: NDArray[Any]) -> NDArray[np.float64]:
    prices = [(t.input_price, t.output_price) for t in POOL.targets]
    return np.array(
        [
            [(n * i + float(length) * o) / 1e6 for length, (i, o) in zip(row, prices, strict=True)]
            for n, row in zip(data.num_tokens, lengths, strict=True)
        ]
    )


def naive_paid(data: HeldOut, router: Contender) -> NDArray[np.float64]:
    known = ~np.isnan(data.output_tokens)
    return naive_cost(data, np.where(known, data.output_tokens, router.expected_output_tokens))


def test_contenders_choose_by_expected_cost_and_pay_for_actual_lengths() -> None:
    data, router, guess = trial(missing=0.0)
    result = evaluated(data, router, guess)
    paid = naive_paid(data, router)
    for contender, standing in zip((router, guess), result.standings, strict=True):
        expected = naive_cost(data, contender.expected_output_tokens)
        scores = score_routing(data.correct, contender.p_correct, expected, contender.tolerance, paid)
        for name, value in vars(scores).items():
            assert getattr(standing.scores, name) == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
        assert standing.intervals["mean_auc"].value == pytest.approx(np.mean(scores.auc))
        whole = cost_coverage_curve(data.correct, contender.p_correct, expected, paid)
        assert {tuple(point) for point in np.round(standing.curve, 12)} <= {tuple(p) for p in np.round(whole, 12)}
    assert result.router == result.standings[0].scores


def test_billed_costs_are_counted_as_they_are() -> None:
    data, router, guess = trial(missing=0.0)
    billed = np.random.default_rng(1).uniform(0.001, 0.1, data.correct.shape)
    billed[::2, 1:] = np.nan
    result = evaluated(replace(data, cost_usd=billed), router, guess)
    paid = np.where(np.isnan(billed), naive_paid(data, router), billed)
    expected = naive_cost(data, router.expected_output_tokens)
    scores = score_routing(data.correct, router.p_correct, expected, router.tolerance, paid)
    assert result.router.cost == pytest.approx(scores.cost, rel=1e-9)
    assert result.target_cost == pytest.approx(paid.mean(0))
    assert result.billed_share == pytest.approx(2 / 3)
    assert evaluated(data, router).billed_share == 0.0


def test_differences_are_paired() -> None:
    data, router, guess = trial(600, missing=0.0)
    same = replace(router, name="same")
    result = evaluated(data, router, guess, same)
    _, of_guess, of_same = result.standings
    assert result.standings[0].router_less_this == {}
    for name in HEADLINES:
        value, low, high = of_guess.router_less_this[name]
        ours, theirs = (s.intervals[name].value for s in result.standings[:2])
        if np.isnan(theirs):  # the baseline never reaches the best single target
            assert name == "saving_at_best_single"
            assert np.isnan(value)
            continue
        assert value == pytest.approx(ours - theirs)
        assert low <= value <= high
    assert set(of_same.router_less_this.values()) == {(0.0, 0.0, 0.0)}
    assert of_guess.router_less_this["mdp_auccc"].low > 0.0
    assert of_guess.router_less_this["mean_auc"].low > 0.0


def test_near_duplicates_make_intervals_wider() -> None:
    data, router, _ = trial(150, missing=0.0)

    def repeated(values: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(values, 4, axis=0)

    data = HeldOut(*(repeated(v) for v in (data.num_tokens, data.correct, data.output_tokens)))
    router = replace(
        router,
        p_correct=repeated(router.p_correct),
        expected_output_tokens=repeated(router.expected_output_tokens),
    )
    alone, together = (
        evaluate(POOL, "v1", replace(data, clusters=clusters), router, num_draws=400).standings[0].intervals["accuracy"]
        for clusters in (None, np.arange(600) // 4)
    )
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(2.0, rel=0.25)


def test_complete_prompts_are_weighted_to_represent_all() -> None:
    data, router, _ = trial(300, missing=0.1)
    result = evaluated(data, router)
    complete = ~np.isnan(data.correct).any(1)
    ease = np.argsort(np.argsort(router.p_correct.mean(1))) * 5 // 300
    weights = np.zeros(300)
    for fifth in range(5):
        inside = ease == fifth
        weights[inside & complete] = inside.sum() / (inside & complete).sum()
    expected = (weights[complete, None] * data.correct[complete]).sum(0) / weights.sum()
    np.testing.assert_allclose(result.target_accuracy, expected, rtol=1e-9)
    assert (result.num_held_out, result.num_complete) == (300, complete.sum())
    assert result.accuracy_of_complete == pytest.approx(
        score_routing(data.correct, router.p_correct, naive_cost(data, router.expected_output_tokens), 0.1).accuracy
    )


def test_operating_points_match_their_tolerance() -> None:
    data, router, _ = trial(400, missing=0.0)
    result = evaluated(data, router)
    expected, paid = naive_cost(data, router.expected_output_tokens), naive_paid(data, router)
    best = max(result.target_accuracy)
    own, most, as_good, *_ = result.operating_points
    assert own.tolerance == 0.1
    curve = cost_coverage_curve(data.correct, router.p_correct, expected, paid)
    assert most.accuracy.value == pytest.approx(curve[:, 1].max())
    assert as_good.accuracy.value >= best
    for point in result.operating_points:
        scores = score_routing(data.correct, router.p_correct, expected, point.tolerance, paid)
        assert point.accuracy.value == pytest.approx(scores.accuracy)
        assert point.cost.value == pytest.approx(scores.cost)
        assert point.efficacy.value == pytest.approx(scores.efficacy)
        assert point.saving_against_dearest.value == pytest.approx(scores.cost_saving)
        assert point.saving_against_best_single.value == pytest.approx(1 - scores.cost / scores.best_single_cost)
    assert as_good.saving_against_best_single.value == pytest.approx(result.router.saving_at_best_single)


def test_every_draw_compares_with_the_best_target_on_all_prompts() -> None:
    """Otherwise draws would alternate between two targets of nearly equal accuracy, one four times cheaper."""
    data, router, _ = trial(300, missing=0.0)
    rng = np.random.default_rng(1)
    large = (rng.random(300) < 0.6).astype(np.float32)
    medium = rng.permutation(large)
    medium[medium.argmax()] = 0.0
    data = replace(data, correct=np.column_stack([large, medium, np.zeros(300, np.float32)]))
    result = evaluated(data, replace(router, p_correct=np.tile([0.7, 0.7, 0.0], (300, 1))))
    saved = result.operating_points[0].saving_against_best_single
    assert saved.value == pytest.approx(1.0 - result.target_cost[1] / result.target_cost[0])
    assert saved.low > saved.value - 0.1


def test_the_band_contains_the_curve() -> None:
    data, router, _ = trial(400)
    result = evaluated(data, router)
    curve = np.array(result.standings[0].curve)
    assert result.band == sorted(result.band)
    for cost, low, high in result.band:
        accuracy = curve[np.argmin(np.abs(curve[:, 0] - cost)), 1]
        assert low - 0.02 <= accuracy <= high + 0.02


def test_the_oracle_closes_the_gap() -> None:
    data, router, _ = trial()
    standing = evaluated(data, router, oracle(data, router.expected_output_tokens)).standings[1]
    assert standing.has_hindsight
    assert standing.scores.efficacy == pytest.approx(1.0)
    assert standing.scores.wrong_choices == 0.0


def test_length_errors_are_mean_absolute_errors_of_known_lengths() -> None:
    data, router, _ = trial()
    result = evaluated(data, router)
    known = ~np.isnan(data.output_tokens)
    medians = np.broadcast_to(np.nanmedian(data.output_tokens, 0), known.shape)

    def error(predicted: NDArray[Any]) -> float:
        return float(np.mean(np.abs(data.output_tokens[known].astype(float) - predicted[known])))

    assert result.length_error_tokens == pytest.approx(error(router.expected_output_tokens), rel=1e-5)
    assert result.length_error_median_rule_tokens == pytest.approx(error(medians), rel=1e-5)


def test_calibration_is_compared_with_the_uncalibrated_predictions() -> None:
    data, router, _ = trial(200)
    before = router.p_correct.copy()
    before[:, 1] **= 2
    assert evaluated(data, router).calibration.unchanged == [True] * 3
    assert evaluated(data, router, p_uncalibrated=before).calibration.unchanged == [True, False, True]


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    data, router, _ = trial(900, missing=0.0)
    curve = evaluated(data, router).standings[0].curve
    expected, paid = naive_cost(data, router.expected_output_tokens), naive_paid(data, router)
    whole = cost_coverage_curve(data.correct, router.p_correct, expected, paid)
    assert len(whole) > 1000 > 300 >= len(curve) > 250
    assert min(curve) == pytest.approx(whole[0])


def test_json_is_finite_with_null_for_undefined_values() -> None:
    data, router, guess = trial()
    data = replace(data, output_tokens=np.full_like(data.output_tokens, np.nan))
    data.correct[:, 0] = 1.0
    result = evaluated(data, router, guess, num_seen=3, about={"Outcomes": "here"})
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["length_error_tokens"] is None
    assert content["router"]["efficacy"] is None
    assert content["router"]["auc"][0] is None
    assert content["router"]["auc"][1] > 0.5
    assert len(content["standings"][1]["router_less_this"]["mean_auc"]) == 3
    assert (content["num_seen"], content["pool"], content["router_version"]) == (3, "three", "v1")
    assert content["targets"] == ["large", "medium", "small"]
    assert content["about"] == {"Outcomes": "here"}


def test_no_held_out_prompt_is_an_error() -> None:
    with pytest.raises(UserError, match="no held-out prompt with outcomes"):
        evaluated(*trial(0)[:2])


def test_no_complete_prompt_is_an_error() -> None:
    data, router, _ = trial()
    data.correct[:, 1] = np.nan
    with pytest.raises(UserError, match="no prompt has an outcome for every target"):
        evaluated(data, router)


def test_scoring_another_learner_matches_a_contender() -> None:
    data, router, baseline = trial()
    standing = evaluated(data, router, replace(baseline, tolerance=router.tolerance)).standings[1]
    found = scoring(POOL, data, router, num_draws=40)(baseline.p_correct)
    assert set(found) == {"mean_auc", "mdp_auccc"}
    for name, values in found.items():
        assert values.shape == (41,)
        assert values[0] == pytest.approx(standing.intervals[name].value)
        assert np.std(values[1:]) > 0.0
    with pytest.raises(UserError, match="no prompt has an outcome for every target"):
        scoring(POOL, replace(data, correct=np.where([True, False, False], np.nan, data.correct)), router)
