"""Baselines that predict the mean outcome of similar training prompts."""

# N prompts, M training prompts, F features, T targets, K clusters

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prefill_router.baselines.base import Baseline, mean_outcomes

Array = NDArray[Any]

NUM_NEIGHBOURS = 40
_CHUNK_ROWS = 1024


@dataclass
class NearestNeighbours(Baseline):
    """Predicts the mean outcome of the nearest training prompts: see `knn_p_correct`."""

    num_neighbours: int = NUM_NEIGHBOURS
    title = "k nearest neighbours"
    reads = "embedding"

    def fit(self, x: Array, correct: Array) -> Self:
        self.features_, self.correct_ = np.asarray(x, np.float32), np.asarray(correct, np.float32)
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        return knn_p_correct(np.asarray(x, np.float32), self.features_, self.correct_, self.num_neighbours)


@dataclass
class Clusters(Baseline):
    """Predicts the mean outcome of the prompt's cluster, from k-means on features scaled to unit length.

    Every cluster gets `prior` extra votes of the target's overall accuracy. By default there is one cluster per 50
    training prompts, at most 64.
    """

    num_clusters: int | None = None
    prior: float = 5.0
    random_state: int = 0
    title = "k-means clusters"
    reads = "embedding"

    def fit(self, x: Array, correct: Array) -> Self:
        from sklearn.cluster import KMeans

        num_clusters = min(self.num_clusters or min(64, max(1, len(x) // 50)), len(x))
        kmeans = KMeans(num_clusters, random_state=self.random_state, n_init=4).fit(_unit(x))
        graded, members = ~np.isnan(correct), np.eye(num_clusters)[kmeans.labels_]
        votes = members.T @ np.nan_to_num(correct) + self.prior * mean_outcomes(correct)
        self.centres_ = np.asarray(kmeans.cluster_centers_, np.float32)
        self.p_ = votes / (members.T @ graded + self.prior)
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        distances = (self.centres_**2).sum(1) - 2.0 * _unit(x) @ self.centres_.T
        return np.asarray(self.p_[distances.argmin(1)])


def knn_p_correct(
    features: NDArray[np.float32],
    training_features: NDArray[np.float32],
    training_correct: NDArray[np.float32],
    num_neighbours: int = NUM_NEIGHBOURS,
) -> NDArray[np.float64]:
    """P(correct) (N, T): the mean outcome of the nearest training prompts by cosine similarity.

    `features` is (N, F), `training_features` (M, F), `training_correct` (M, T). Missing outcomes (NaN) are left out.
    One extra vote of the target's overall accuracy defines the value if no neighbour has an outcome.
    """
    queries, keys = _unit(features), _unit(training_features)
    graded = ~np.isnan(training_correct)
    votes, prior = np.nan_to_num(training_correct), mean_outcomes(training_correct)
    k = min(num_neighbours, len(keys))
    p = np.empty((len(queries), votes.shape[1]))
    for start in range(0, len(queries), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        similarity = queries[rows] @ keys.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        p[rows] = (votes[nearest].sum(1) + prior) / (graded[nearest].sum(1) + 1.0)
    return p


def _unit(features: Array) -> NDArray[np.float32]:
    rows = np.asarray(features, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)))
