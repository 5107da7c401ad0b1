"""Stacking: P(correct) as the weighted mean of the log-odds of trunk and kernel machine.

The weight is fitted on held-out prompts. Source: Wolpert (1992), stacked generalisation.
"""

# N prompts, T targets

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the kernel machine
_MIN_P = 0.01  # probabilities are clipped, because a kernel machine's outputs may be outside [0, 1]


def stacked(p_trunk: Array, p_kernel: NDArray[Any], weight: float) -> Array:
    """Combines P(correct) (N, T) of trunk and kernel machine; a `weight` of 0 returns the trunk's unchanged."""
    if not weight:
        return p_trunk
    logits = (1.0 - weight) * _logit(p_trunk) + weight * _logit(p_kernel)
    return np.asarray(1.0 / (1.0 + np.exp(-logits)), np.float32)


def best_weight(p_trunk: Array, p_kernel: NDArray[Any], correct: Array) -> float:
    """Returns the weight with the least log loss on held-out outcomes (N, T), NaN where missing."""
    known = ~np.isnan(correct)

    def loss(weight: float) -> float:
        p = np.clip(stacked(p_trunk, p_kernel, weight), _MIN_P, 1.0 - _MIN_P)[known]
        y = correct[known]
        return float(-(y * np.log(p) + (1.0 - y) * np.log1p(-p)).sum())

    return min(WEIGHTS, key=loss)


def _logit(p: NDArray[Any]) -> NDArray[Any]:
    clipped = np.clip(p, _MIN_P, 1.0 - _MIN_P)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
