"""What a router has to beat, beside every single target: the mean outcome of the nearest training prompts."""

# N prompts, M training prompts, F features, T targets, K neighbours

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_NEIGHBOURS = 40
_CHUNK_ROWS = 1024


def knn_p_correct(
    features: NDArray[np.float32],
    training_features: NDArray[np.float32],
    training_correct: NDArray[np.float32],
    num_neighbours: int = NUM_NEIGHBOURS,
) -> NDArray[np.float64]:
    """P(correct) (N, T): the mean outcome of the nearest training prompts by cosine similarity.

    `features` (N, F), `training_features` (M, F), `training_correct` (M, T) with NaN for missing outcomes, which are
    left out. One more vote of the target's overall accuracy settles the case in which no neighbour was graded.
    """
    queries, keys = _unit(features), _unit(training_features)
    graded = ~np.isnan(training_correct)
    votes = np.nan_to_num(training_correct)
    prior = votes.sum(0) / np.maximum(graded.sum(0), 1)
    k = min(num_neighbours, len(keys))
    p = np.empty((len(queries), votes.shape[1]))
    for start in range(0, len(queries), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        similarity = queries[rows] @ keys.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        p[rows] = (votes[nearest].sum(1) + prior) / (graded[nearest].sum(1) + 1.0)
    return p


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norms, np.float32(1e-12)))
