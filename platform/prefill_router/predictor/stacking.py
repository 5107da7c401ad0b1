"""P(correct) of trunk and kernel machine together: the mean of their log-odds, weighted as held-out prompts ask.

Source: Wolpert (1992), stacked generalisation.
"""

# N prompts, T targets

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the kernel machine
_MIN_P = 0.01  # a kernel machine's outputs may leave [0, 1]


def stacked(p_trunk: Array, p_kernel: NDArray[Any], weight: float) -> Array:
    """P(correct) (N, T) from the trunk's and the kernel machine's; the trunk's own, untouched, where `weight` is 0."""
    if not weight:
        return p_trunk
    logits = (1.0 - weight) * _logit(p_trunk) + weight * _logit(p_kernel)
    return np.asarray(1.0 / (1.0 + np.exp(-logits)), np.float32)


def best_weight(p_trunk: Array, p_kernel: NDArray[Any], correct: Array) -> float:
    """The weight of the least log loss on outcomes (N, T), NaN where missing, that neither was fitted on."""
    known = ~np.isnan(correct)

    def loss(weight: float) -> float:
        p = np.clip(stacked(p_trunk, p_kernel, weight), _MIN_P, 1.0 - _MIN_P)[known]
        y = correct[known]
        return float(-(y * np.log(p) + (1.0 - y) * np.log1p(-p)).sum())

    return min(WEIGHTS, key=loss)


def _logit(p: NDArray[Any]) -> NDArray[Any]:
    clipped = np.clip(p, _MIN_P, 1.0 - _MIN_P)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
