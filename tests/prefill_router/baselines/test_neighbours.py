from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from prefill_router.baselines.neighbours import NUM_NEIGHBOURS, knn_p_correct

Array = NDArray[np.float32]


def prompts(num_prompts: int, seed: int = 0, missing: float = 0.3) -> tuple[Array, Array]:
    """Features (N, 6) of various norms, and outcomes (N, 3), some missing."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_prompts, 6)) * rng.uniform(0.1, 10, (num_prompts, 1))
    correct = rng.choice([0.0, 0.5, 1.0], (num_prompts, 3))
    correct[rng.random(correct.shape) < missing] = np.nan
    return features.astype(np.float32), correct.astype(np.float32)


def naive_knn(queries: Array, features: Array, correct: Array, k: int) -> NDArray[np.float64]:
    """The mean outcome of the neighbours that scikit-learn finds, with one extra vote of the target's mean."""
    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features).kneighbors(queries)[1]
    prior = np.nanmean(correct, 0)
    p = np.empty((len(queries), correct.shape[1]))
    for i, nearest in enumerate(neighbours):
        for t in range(correct.shape[1]):
            votes = [correct[j, t] for j in nearest if not np.isnan(correct[j, t])]
            p[i, t] = np.mean([*votes, prior[t]])
    return p


@pytest.mark.parametrize("k", [1, 5, NUM_NEIGHBOURS])
def test_p_is_the_mean_outcome_of_the_nearest_by_cosine(k: int) -> None:
    features, correct = prompts(150)
    queries, _ = prompts(40, seed=1)
    expected = naive_knn(queries, features, correct, k)
    np.testing.assert_allclose(knn_p_correct(queries, features, correct, k), expected, atol=1e-6)


def test_many_queries_get_the_same_answers_as_few() -> None:
    features, correct = prompts(100)
    queries, _ = prompts(2100, seed=1)
    p = knn_p_correct(queries, features, correct, 7)
    for rows in (slice(0, 3), slice(1022, 1027), slice(2097, 2100)):
        np.testing.assert_allclose(p[rows], knn_p_correct(queries[rows], features, correct, 7), atol=1e-6)


def test_fewer_training_prompts_than_neighbours_all_vote() -> None:
    features, correct = prompts(10, missing=0.0)
    queries, _ = prompts(4, seed=1)
    np.testing.assert_allclose(knn_p_correct(queries, features, correct), np.tile(correct.mean(0), (4, 1)), atol=1e-6)


def test_neighbours_without_outcomes_leave_the_overall_accuracy() -> None:
    features = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-0.1, 1.0]], np.float32)
    correct = np.array([[np.nan], [np.nan], [1.0], [0.5]], np.float32)
    assert knn_p_correct(features[:1], features, correct, 2) == pytest.approx(0.75)


def test_a_target_that_was_never_graded_has_no_chance() -> None:
    features, correct = prompts(20)
    correct[:, 1] = np.nan
    p = knn_p_correct(features[:3], features, correct)
    np.testing.assert_array_equal(p[:, 1], 0.0)
    assert np.isfinite(p).all()


def test_zero_features_give_probabilities() -> None:
    features, correct = prompts(50)
    p = knn_p_correct(np.zeros((2, 6), np.float32), features, correct)
    assert ((p >= 0.0) & (p <= 1.0)).all()
