from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prefill_router.errors import UserError
from prefill_router.evaluation import HeldOut, evaluate
from prefill_router.metrics import cost_coverage_curve, score_routing
from prefill_router.pool import Pool, Target

POOL = Pool(
    name="three",
    targets=(
        Target(name="large", input_price=2.0, output_price=8.0),
        Target(name="medium", input_price=0.5, output_price=2.0),
        Target(name="small", input_price=0.1, output_price=0.4),
    ),
)


def held_out(num_prompts: int = 80, seed: int = 0, missing: float = 0.1) -> HeldOut:
    """Prompts of three targets, the dearer ones better; some outcomes are missing, and some lengths of the others."""
    rng = np.random.default_rng(seed)
    shape = (num_prompts, 3)
    chances = np.clip(rng.random((num_prompts, 1)) + np.array([0.3, 0.1, -0.1]), 0.02, 0.98)
    correct = (rng.random(shape) < chances).astype(np.float32)
    output_tokens = rng.integers(5, 400, shape).astype(np.float32)
    output_tokens[rng.random(shape) < missing] = np.nan
    gone = rng.random(shape) < missing
    correct[gone] = output_tokens[gone] = np.nan
    return HeldOut(
        num_tokens=rng.integers(10, 300, num_prompts),
        correct=correct,
        output_tokens=output_tokens,
        p_correct=np.clip(chances + rng.normal(0, 0.1, shape), 0, 1).astype(np.float32),
        p_uncalibrated=np.clip(chances + rng.normal(0, 0.2, shape), 0, 1).astype(np.float32),
        expected_output_tokens=rng.uniform(50, 300, shape).astype(np.float32),
        knn_p_correct=np.clip(chances + rng.normal(0, 0.3, shape), 0, 1),
    )


def naive_cost(data: HeldOut, lengths: NDArray[Any]) -> NDArray[np.float64]:
    prices = [(t.input_price, t.output_price) for t in POOL.targets]
    return np.array(
        [
            [(n * i + float(length) * o) / 1e6 for length, (i, o) in zip(row, prices, strict=True)]
            for n, row in zip(data.num_tokens, lengths, strict=True)
        ]
    )


def naive_paid(data: HeldOut) -> NDArray[np.float64]:
    known = ~np.isnan(data.output_tokens)
    return naive_cost(data, np.where(known, data.output_tokens, data.expected_output_tokens))


def test_router_is_chosen_by_expected_cost_and_counted_by_real_lengths() -> None:
    data = held_out()
    result = evaluate(POOL, "v1", 0.1, data, num_seen=0)
    expected, paid = naive_cost(data, data.expected_output_tokens), naive_paid(data)
    scores = score_routing(data.correct, data.p_correct, expected, 0.1, paid)
    assert result.router.accuracy == scores.accuracy
    assert result.router.cost == pytest.approx(scores.cost, rel=1e-9)
    assert result.router.p_auccc == pytest.approx(scores.p_auccc, rel=1e-6)
    assert result.router.auc == pytest.approx(scores.auc)


def test_neighbours_are_scored_at_tolerance_zero() -> None:
    data = held_out()
    assert data.knn_p_correct is not None
    result = evaluate(POOL, "v1", 0.3, data, num_seen=0)
    expected, paid = naive_cost(data, data.expected_output_tokens), naive_paid(data)
    scores = score_routing(data.correct, data.knn_p_correct, expected, 0.0, paid)
    assert result.knn is not None
    assert result.knn.accuracy == scores.accuracy
    assert result.knn.cost == pytest.approx(scores.cost, rel=1e-9)


def test_targets_are_counted_on_the_prompts_that_all_of_them_answered() -> None:
    data = held_out()
    result = evaluate(POOL, "v1", 0.1, data, num_seen=0)
    complete = [i for i in range(80) if not np.isnan(data.correct[i]).any()]
    assert 0 < len(complete) < 80
    np.testing.assert_allclose(result.target_accuracy, data.correct[complete].mean(0), rtol=1e-6)
    np.testing.assert_allclose(result.target_cost, naive_paid(data)[complete].mean(0), rtol=1e-9)
    assert result.router.num_prompts == len(complete)


def test_names_and_counts_are_passed_on() -> None:
    result = evaluate(POOL, "v1", 0.25, held_out(), num_seen=17)
    assert (result.pool, result.targets) == ("three", ["large", "medium", "small"])
    assert (result.router_version, result.tolerance) == ("v1", 0.25)
    assert (result.num_held_out, result.num_seen) == (80, 17)


def test_length_errors_are_mean_absolute_errors_of_known_lengths() -> None:
    data = held_out()
    result = evaluate(POOL, "v1", 0.1, data, num_seen=0)
    known = ~np.isnan(data.output_tokens)
    medians = np.broadcast_to(np.nanmedian(data.output_tokens, 0), known.shape)

    def error(predicted: NDArray[Any]) -> float:
        return float(np.mean(np.abs(data.output_tokens[known].astype(float) - predicted[known])))

    assert result.length_error_tokens == pytest.approx(error(data.expected_output_tokens), rel=1e-5)
    assert result.length_error_median_rule_tokens == pytest.approx(error(medians), rel=1e-5)


def test_curves_are_those_of_router_and_neighbours() -> None:
    data = held_out()
    curves = evaluate(POOL, "v1", 0.1, data, num_seen=0).curves
    expected = naive_cost(data, data.expected_output_tokens)
    assert list(curves) == ["router", "knn"]
    for name, p in {"router": data.p_correct, "knn": data.knn_p_correct}.items():
        assert p is not None
        np.testing.assert_allclose(curves[name], cost_coverage_curve(data.correct, p, expected, naive_paid(data)))


def test_a_long_curve_is_thinned_between_its_ends() -> None:
    data = held_out(900, missing=0.0)
    curve = evaluate(POOL, "v1", 0.1, data, num_seen=0).curves["router"]
    whole = cost_coverage_curve(
        data.correct, data.p_correct, naive_cost(data, data.expected_output_tokens), naive_paid(data)
    )
    assert len(whole) > 1000 >= len(curve) > 900
    np.testing.assert_allclose([curve[0], curve[-1]], whole[[0, -1]])
    assert curve == sorted(curve)


def test_without_neighbours_there_is_no_baseline() -> None:
    result = evaluate(POOL, "v1", 0.1, replace(held_out(), knn_p_correct=None), num_seen=0)
    assert result.knn is None
    assert list(result.curves) == ["router"]


def test_json_is_finite_and_says_null_where_there_is_no_value() -> None:
    data = held_out()
    unknown = replace(data, output_tokens=np.full_like(data.output_tokens, np.nan), knn_p_correct=None)
    unknown.correct[:, 0] = 1.0
    content = json.loads(json.dumps(evaluate(POOL, "v1", 0.1, unknown, num_seen=3).to_json(), allow_nan=False))
    assert content["length_error_tokens"] is None
    assert content["length_error_median_rule_tokens"] is None
    assert content["knn"] is None
    assert content["router"]["efficacy"] is None
    assert content["router"]["auc"][0] is None
    assert content["router"]["auc"][1] > 0.5
    assert content["num_seen"] == 3
    assert content["targets"] == ["large", "medium", "small"]
    assert len(content["curves"]["router"][0]) == 2


def test_no_held_out_prompt_is_an_error() -> None:
    with pytest.raises(UserError, match="no held-out prompt with outcomes"):
        evaluate(POOL, "v1", 0.1, held_out(0), num_seen=40)


def test_no_complete_prompt_is_an_error() -> None:
    data = held_out()
    data.correct[:, 1] = np.nan
    with pytest.raises(UserError, match="no prompt has an outcome of every target"):
        evaluate(POOL, "v1", 0.1, data, num_seen=0)
