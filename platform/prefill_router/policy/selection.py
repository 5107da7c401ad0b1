"""The selection rule: the cheapest target that is good enough, under constraints.

Source: platform/METHOD.md, "Choosing".
"""

# N prompts, T targets

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

OUT_OF_DISTRIBUTION_SHARE = (
    0.999  # a prompt is out of distribution if at least this share of training prompts is nearer
)
NO_TARGET = -1


def choose(
    p: ArrayLike,
    cost: ArrayLike,
    tolerance: float = 0.0,
    allowed: ArrayLike | None = None,
    max_cost: float | None = None,
    min_p: float | None = None,
    latency: ArrayLike | None = None,
    max_latency: float | None = None,
) -> NDArray[np.int64]:
    """Returns the target index of each prompt (N,), or NO_TARGET if none meets the constraints.

    `p` (N, T) is P(correct), `cost` (T,) or (N, T) the expected cost in USD. A target is eligible if it is `allowed`
    (bool, (T,) or (N, T)), costs at most `max_cost`, has p >= `min_p`, and its `latency` ((T,) or (N, T), in seconds,
    NaN if unknown) is not above `max_latency`. Among eligible targets with max p - p_t <= tolerance, the cheapest is
    chosen; a tie goes to the higher p, then to the earlier target.
    Raises ValueError for mismatched shapes, a NaN or a negative tolerance.
    """
    p_NT = np.asarray(p, np.float64)
    if p_NT.ndim != 2:
        raise ValueError(f"p has shape {p_NT.shape}, must be (prompts, targets)")
    cost_NT = _per_prompt(cost, p_NT.shape, "cost")
    if np.isnan(p_NT).any() or np.isnan(cost_NT).any():
        raise ValueError("p and cost must not be NaN")
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance = {tolerance}, must be >= 0")
    eligible = np.ones(p_NT.shape, bool)
    if allowed is not None:
        eligible &= _per_prompt(allowed, p_NT.shape, "allowed").astype(bool)
    if max_cost is not None:
        eligible &= cost_NT <= max_cost
    if min_p is not None:
        eligible &= p_NT >= min_p
    if latency is not None and max_latency is not None:
        eligible &= ~(_per_prompt(latency, p_NT.shape, "latency") > max_latency)
    best = np.where(eligible, p_NT, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        eligible &= best - p_NT <= tolerance
    # lexsort is stable, so remaining ties go to the earlier target.
    ranked = np.lexsort((-p_NT, np.where(eligible, cost_NT, np.inf), ~eligible), axis=1)
    return np.where(eligible.any(axis=1), ranked[:, 0], NO_TARGET)


def _per_prompt(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape not in (shape, shape[1:]):
        raise ValueError(f"{name} has shape {array.shape}, must be {shape[1:]} or {shape}")
    return np.broadcast_to(array, shape)
