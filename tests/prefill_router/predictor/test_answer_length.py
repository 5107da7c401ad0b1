from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.predictor.answer_length import (
    UNKNOWN_LENGTH_TOKENS,
    log_lengths,
    mean_scale,
    mean_tokens,
    median_logs,
    median_tokens,
    quantile_tokens,
    spread,
)

Array = NDArray[np.float32]

NAN = float("nan")


def lengths(num_prompts: int, seed: int = 0, missing: float = 0.2) -> Array:
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal([4.0, 5.0, 6.0], [0.3, 0.6, 1.0], (num_prompts, 3)).round()
    tokens[rng.random(tokens.shape) < missing] = np.nan
    return tokens.astype(np.float32)


def test_labels_are_logs_and_missing_ones_stay_missing() -> None:
    tokens = lengths(200)
    labels = log_lengths(tokens)
    np.testing.assert_array_equal(np.isnan(labels), np.isnan(tokens))
    np.testing.assert_allclose(median_tokens(labels)[~np.isnan(tokens)], tokens[~np.isnan(tokens)], rtol=1e-4)


def test_medians_are_those_of_the_known_lengths() -> None:
    tokens = lengths(51)
    np.testing.assert_allclose(np.expm1(median_logs(tokens)), np.nanmedian(tokens, 0), rtol=0.05)


def test_a_target_without_lengths_takes_the_median_of_all() -> None:
    tokens = lengths(51, missing=0.0)
    tokens[:, 1] = np.nan
    assert np.expm1(median_logs(tokens)[1]) == pytest.approx(np.nanmedian(tokens), rel=0.05)


def test_without_any_length_every_target_takes_the_unknown_one() -> None:
    unknown = np.full((4, 2), np.nan, np.float32)
    np.testing.assert_allclose(median_tokens(log_lengths(unknown)), UNKNOWN_LENGTH_TOKENS, rtol=1e-5)
    np.testing.assert_allclose(median_tokens(median_logs(unknown)), UNKNOWN_LENGTH_TOKENS, rtol=1e-5)


def test_the_spread_is_the_deviation_of_the_known_logs() -> None:
    tokens = lengths(4000)
    found = spread(tokens, np.broadcast_to(np.array([4.0, 5.0, 6.0], np.float32), tokens.shape))
    np.testing.assert_allclose(found, [0.3, 0.6, 1.0], rtol=0.05)
    np.testing.assert_array_equal(spread(np.full((3, 1), NAN, np.float32), np.zeros((3, 1), np.float32)), [0.0])


def test_as_many_answers_as_said_are_below_a_quantile() -> None:
    tokens = lengths(4000, missing=0.0)
    logs = np.broadcast_to(np.array([4.0, 5.0, 6.0], np.float32), tokens.shape)
    for q in (0.1, 0.5, 0.9):
        below = (tokens <= quantile_tokens(logs, spread(tokens, logs), q)).mean(0)
        np.testing.assert_allclose(below, q, atol=0.03)


def test_means_sum_to_the_known_lengths() -> None:
    tokens = lengths(4000)
    logs = np.broadcast_to(np.array([4.0, 5.0, 6.0], np.float32), tokens.shape)
    scale = mean_scale(tokens, logs)
    np.testing.assert_allclose(mean_tokens(logs, scale)[0], np.nanmean(tokens, 0), rtol=1e-4)
    np.testing.assert_allclose(
        scale, np.exp(np.array([0.3, 0.6, 1.0]) ** 2 / 2), rtol=0.1
    )  # mean over median of a log-normal
    np.testing.assert_array_equal(mean_scale(np.full((3, 1), NAN, np.float32), np.zeros((3, 1), np.float32)), [1.0])


@settings(deadline=None)
@given(st.floats(-1e4, 1e4))
def test_a_length_is_at_least_one_and_finite(log: float) -> None:
    predicted = median_tokens(np.array([[log]], np.float32))
    assert np.isfinite(predicted).all()
    assert (predicted >= 1.0).all()
