from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.feed import Feed, Rows
from prefill_router.length import UNKNOWN_LENGTH_TOKENS, LengthHead, LengthScale, mean_factor
from prefill_router.recipe import Recipe
from prefill_router.training import Trainer, fit
from prefill_router.trunk import SharedTrunkNet

Array = NDArray[np.float32]

NAN = float("nan")
FACTOR = np.array([1.5, 1.0], np.float32)
SCALE = LengthScale(np.array([4.0, 5.0], np.float32), np.array([0.5, 2.0], np.float32))


def lengths(num_prompts: int, seed: int = 0, missing: float = 0.2) -> Array:
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal([4.0, 5.0, 6.0], [0.3, 0.6, 1.0], (num_prompts, 3)).round()
    tokens[rng.random(tokens.shape) < missing] = np.nan
    return tokens.astype(np.float32)


def constant_net(means: list[list[float]], log_std: float = -4.0) -> SharedTrunkNet:
    """Ignores its three features: `means` (K, T)."""
    biases = torch.tensor([[*row, *[log_std] * len(row)] for row in means])[:, None]
    weights = torch.zeros(len(biases), 3, biases.shape[2])
    return SharedTrunkNet.from_state({"weights.0": weights, "biases.0": biases})


def test_scale_is_mean_and_deviation_of_the_known_logs() -> None:
    tokens = lengths(50)
    scale = LengthScale.of(tokens)
    logs = np.log(1.0 + tokens.astype(np.float64))
    np.testing.assert_allclose(scale.mean, np.nanmean(logs, 0), rtol=1e-6)
    np.testing.assert_allclose(scale.std, np.nanstd(logs, 0), rtol=1e-6)


def test_a_target_without_lengths_takes_the_scale_of_all() -> None:
    tokens = lengths(50)
    tokens[:, 1] = np.nan
    logs = np.log1p(tokens.astype(np.float64))
    scale = LengthScale.of(tokens)
    assert scale.mean[1] == pytest.approx(np.nanmean(logs), rel=1e-6)
    assert scale.std[1] == pytest.approx(np.nanstd(logs), rel=1e-6)


def test_without_any_length_every_target_takes_the_unknown_one() -> None:
    scale = LengthScale.of(np.full((4, 2), np.nan, np.float32))
    head = LengthHead(constant_net([[0.0, 0.0]]), scale, np.ones(2, np.float32))
    np.testing.assert_allclose(head(np.zeros((3, 3), np.float32)), UNKNOWN_LENGTH_TOKENS, rtol=1e-5)


def test_labels_are_standardised_and_missing_ones_stay_missing() -> None:
    tokens = lengths(200)
    labels = LengthScale.of(tokens).standardised(tokens)
    np.testing.assert_array_equal(np.isnan(labels), np.isnan(tokens))
    np.testing.assert_allclose(np.nanmean(labels, 0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(labels, 0), 1.0, atol=1e-5)


def test_answers_of_one_length_are_predicted_to_have_it() -> None:
    tokens = np.full((6, 2), 100.0, np.float32)
    scale = LengthScale.of(tokens)
    assert np.isfinite(scale.standardised(tokens)).all()
    head = LengthHead(constant_net([[0.0, 0.0]]), scale, np.ones(2, np.float32))
    np.testing.assert_allclose(head(np.zeros((3, 3), np.float32)), 100.0, rtol=1e-4)


def test_head_undoes_scale_and_log_then_applies_the_factor() -> None:
    head = LengthHead(constant_net([[1.0, -1.0], [0.0, 0.0]]), SCALE, FACTOR)
    predicted = head(np.zeros((4, 3), np.float32))
    assert predicted.shape == (4, 2)
    assert predicted.dtype == np.float32
    expected = [np.exp(4.0 + 0.5 * 0.5) * 1.5 - 1, np.exp(5.0 - 0.5 * 2.0) - 1]
    np.testing.assert_allclose(predicted, np.tile(expected, (4, 1)), rtol=1e-3)  # the spread is next to nothing


def test_a_spread_raises_the_mean_and_parts_the_quantiles() -> None:
    head = LengthHead(constant_net([[0.0, 0.0]], log_std=-0.5), SCALE, np.ones(2, np.float32))
    features = np.zeros((1, 3), np.float32)
    std = np.exp(-0.5) * SCALE.std
    np.testing.assert_allclose(head(features)[0], np.exp(SCALE.mean + std**2 / 2) - 1, rtol=1e-5)
    np.testing.assert_allclose(head.quantile(features, 0.5)[0], np.exp(SCALE.mean) - 1, rtol=1e-5)
    np.testing.assert_allclose(head.quantile(features, 0.9)[0], np.exp(SCALE.mean + 1.2815516 * std) - 1, rtol=1e-5)


@settings(deadline=None)
@given(st.floats(-1e4, 1e4))
def test_expected_length_is_at_least_one_and_finite(output: float) -> None:
    head = LengthHead(constant_net([[output, -output]]), SCALE, FACTOR)
    predicted = head(np.zeros((1, 3), np.float32))
    assert np.isfinite(predicted).all()
    assert (predicted >= 1.0).all()


def test_factor_makes_the_mean_of_the_known_lengths_right() -> None:
    tokens = lengths(300)
    medians = np.broadcast_to(np.nanmedian(tokens, 0), tokens.shape).astype(np.float32)
    factor = mean_factor(tokens, medians)
    assert factor.dtype == np.float32
    assert (factor > 1.0).all()
    known = ~np.isnan(tokens)
    for t in range(3):
        unbiased = (medians[known[:, t], t] + 1.0) * factor[t] - 1.0
        assert unbiased.mean() == pytest.approx(float(np.nanmean(tokens[:, t])), rel=1e-4)


def test_factor_of_a_target_without_lengths_is_one() -> None:
    tokens = np.array([[9.0, NAN], [19.0, NAN]], np.float32)
    np.testing.assert_allclose(mean_factor(tokens, np.full((2, 2), 4.0, np.float32)), [3.0, 1.0])


def test_a_trained_head_predicts_lengths_that_features_tell() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(900, 3)).astype(np.float32)
    tokens = np.exp(np.array([4.0, 5.0]) + 0.5 * features[:, :2] + rng.normal(0, 0.2, (900, 2))).astype(np.float32)
    seen, held_out = slice(0, 700), slice(700, 900)
    scale = LengthScale.of(tokens[seen])
    labels = scale.standardised(tokens)
    train, validation = (
        Rows(torch.tensor(features[r]), {"net": torch.tensor(labels[r])}, torch.arange(r.start, r.stop).int())
        for r in (seen, held_out)
    )
    recipe = Recipe((32,), (0.0,), 0.0, 3e-3, batch_size=64, max_epochs=20, num_seeds=1, keep=1, loss="log_normal")
    trainer = Trainer("net", recipe, 3, [1.0, 1.0], seed=0)
    fit(Feed([700], {0: train}, {0: validation}, train[:0]), [trainer], seed=0)
    head = LengthHead(trainer.fitted().net, scale, np.ones(2, np.float32))
    head = replace(head, factor=mean_factor(tokens[seen], head(features[seen])))
    predicted = head(features[held_out])
    error = np.abs(predicted - tokens[held_out]).mean(0)
    error_of_median = np.abs(np.median(tokens[seen], 0) - tokens[held_out]).mean(0)
    assert (error < 0.6 * error_of_median).all()
    np.testing.assert_allclose(predicted.mean(0), tokens[held_out].mean(0), rtol=0.1)
    covered = (tokens[held_out] <= head.quantile(features[held_out], 0.9)).mean(0)
    np.testing.assert_allclose(covered, 0.9, atol=0.06)
