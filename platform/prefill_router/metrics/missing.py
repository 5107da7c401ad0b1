"""Weights that correct routing metrics for prompts with missing outcomes."""

# N prompts, T targets

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_STRATA = 5


def completeness_weights(
    correct: ArrayLike, difficulty: ArrayLike, num_strata: int = NUM_STRATA
) -> NDArray[np.float64]:
    """Weights (N,) that let complete prompts represent all prompts; incomplete prompts weigh 0.

    `correct` is (N, T) with NaN for missing outcomes. `difficulty` (N,) is any value known for every prompt, such as
    the mean P(correct) that a router predicts. Prompts are split by difficulty into `num_strata` strata of equal size.
    A complete prompt's weight is the number of prompts in its stratum divided by the number of complete ones. A
    stratum without a complete prompt is merged with the next one. The weights sum to N; all are 0 if no prompt is
    complete.

    Weighted means are unbiased if, within a stratum, missingness does not depend on the outcome (Horvitz and Thompson,
    1952; Little, 1986). Dropping incomplete prompts is unbiased only if missingness does not depend on difficulty
    either.
    """
    is_complete = ~np.isnan(np.asarray(correct, np.float64)).any(1)
    order = np.argsort(np.asarray(difficulty, np.float64), kind="stable")
    stratum = np.empty(len(order), np.int64)
    stratum[order] = np.arange(len(order)) * num_strata // max(len(order), 1)
    sizes, complete = (np.bincount(s, minlength=num_strata) for s in (stratum, stratum[is_complete]))
    filled = np.flatnonzero(complete)
    if not len(filled):
        return np.zeros(len(order))
    merged = filled[np.minimum(np.searchsorted(filled, np.arange(num_strata)), len(filled) - 1)]
    weights = np.bincount(merged, weights=sizes, minlength=num_strata) / np.maximum(complete, 1)
    return np.where(is_complete, weights[stratum], 0.0)
