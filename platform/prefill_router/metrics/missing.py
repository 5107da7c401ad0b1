"""Prompts on which an outcome is missing, and what leaving them out would bias."""

# N prompts, T targets

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_STRATA = 5


def completeness_weights(
    correct: ArrayLike, difficulty: ArrayLike, num_strata: int = NUM_STRATA
) -> NDArray[np.float64]:
    """Weights (N,) under which the prompts with all outcomes stand for all prompts; 0 for the others.

    `correct` is (N, T) with NaN for missing outcomes; `difficulty` (N,) is anything known of every prompt, such as the
    mean P(correct) that a router gives it. Prompts are cut into `num_strata` of equal size by difficulty, and each
    complete one weighs as many as there are prompts to a complete one in its stratum. Means are then unbiased where,
    among prompts as difficult, what is missing does not depend on what came of it (Horvitz and Thompson, 1952; Little,
    1986); leaving the others out is unbiased only where it does not depend on difficulty either. A stratum without a
    complete prompt joins the next. The weights add up to N; all are 0 where no prompt is complete.
    """
    has_all = ~np.isnan(np.asarray(correct, np.float64)).any(1)
    order = np.argsort(np.asarray(difficulty, np.float64), kind="stable")
    stratum = np.empty(len(order), np.int64)
    stratum[order] = np.arange(len(order)) * num_strata // max(len(order), 1)
    sizes, complete = (np.bincount(s, minlength=num_strata) for s in (stratum, stratum[has_all]))
    filled = np.flatnonzero(complete)
    if not len(filled):
        return np.zeros(len(order))
    joins = filled[np.minimum(np.searchsorted(filled, np.arange(num_strata)), len(filled) - 1)]
    stands_for = np.bincount(joins, weights=sizes, minlength=num_strata) / np.maximum(complete, 1)
    return np.where(has_all, stands_for[stratum], 0.0)
