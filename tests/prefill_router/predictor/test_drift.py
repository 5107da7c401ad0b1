"""Distances against a numpy reference, which leaves out one training prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_router.predictor import drift
from prefill_router.predictor.drift import TrainingDistance


def reference(train: np.ndarray, x: np.ndarray, ridge: float) -> float:
    """The distance of one prompt `x` from the prompts `train`."""
    deviations = train - train.mean(0)
    inverse = np.linalg.inv(deviations.T @ deviations + ridge * np.eye(train.shape[1]))
    d = x - train.mean(0)
    return float(np.sqrt(len(train) * d @ inverse @ d / train.shape[1]))


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)


def test_a_training_prompts_distance_is_to_the_moments_of_the_others(train: np.ndarray) -> None:
    distance = TrainingDistance.of(train)
    assert distance is not None
    centred = train - train.mean(0)
    ridge = drift._SHRINKAGE * np.trace(centred.T @ centred) / 5
    expected = sorted(reference(np.delete(train, i, 0), x, ridge) for i, x in enumerate(train))
    np.testing.assert_allclose(distance.known, expected, rtol=1e-5)


def test_a_new_prompts_distance_is_to_the_moments_of_all(train: np.ndarray) -> None:
    distance = TrainingDistance.of(train)
    assert distance is not None
    centred = train - train.mean(0)
    ridge = drift._SHRINKAGE * np.trace(centred.T @ centred) / 5
    new = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(distance(new), [reference(train, x, ridge) for x in new], rtol=1e-4)


def test_new_prompts_of_the_same_kind_are_spread_evenly_over_the_percentiles() -> None:
    """Holds even with few prompts per feature, where distances without leave-one-out would be biased."""
    rng = np.random.default_rng(2)
    distance = TrainingDistance.of(rng.normal(size=(400, 100)))
    assert distance is not None
    percentiles = distance.percentile(distance(rng.normal(size=(2000, 100)).astype(np.float32)))
    assert percentiles.mean() == pytest.approx(0.5, abs=0.06)
    assert (percentiles > 0.9).mean() == pytest.approx(0.1, abs=0.04)
    strangers = distance.percentile(distance(rng.normal(size=(200, 100)).astype(np.float32) * 2))
    assert (strangers == 1.0).mean() > 0.95


def test_a_distance_by_some_features_is_that_of_prompts_that_have_no_others(train: np.ndarray) -> None:
    columns = np.array([0, 3])
    distance, alone = TrainingDistance.of(train, columns), TrainingDistance.of(train[:, columns])
    assert distance is not None
    assert alone is not None
    new = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_array_equal(distance.known, alone.known)
    np.testing.assert_array_equal(distance(new), alone(new[:, columns]))


def test_too_few_prompts_tell_nothing() -> None:
    assert TrainingDistance.of(np.zeros((60, 0), np.float16)) is None
    assert TrainingDistance.of(np.zeros((0, 7), np.float16)) is None
    assert TrainingDistance.of(np.zeros((10, 7), np.float16)) is None


def test_features_that_never_vary_do_no_harm() -> None:
    distance = TrainingDistance.of(np.zeros((60, 3)))
    assert distance is not None
    assert np.isfinite(distance(np.zeros((1, 3), np.float32))).all()
