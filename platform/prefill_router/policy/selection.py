"""Choosing a target: the cheapest that is good enough, under constraints. Source: METHOD, "Choosing"."""

# N prompts, T targets

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

STRANGER = 0.999  # share of training prompts that lie nearer than a prompt that is called out of distribution
NO_TARGET = -1


def choose(
    p: ArrayLike,
    cost: ArrayLike,
    tolerance: float = 0.0,
    allowed: ArrayLike | None = None,
    max_cost: float | None = None,
    min_p: float | None = None,
) -> NDArray[np.int64]:
    """The target of each prompt (N,), or -1 where none meets the constraints.

    `p` (N, T) is P(correct) and `cost` (T,) or (N, T) the expected cost in USD. Of the targets that are `allowed`
    (bool, (T,) or (N, T)), cost at most `max_cost` and reach `min_p`, those with max p - p_t <= tolerance are good
    enough, and the cheapest of them is chosen; a tie in cost goes to the higher p, then to the pool's order.
    Raises ValueError for shapes that do not fit, a NaN, and a tolerance below zero.
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
    best = np.where(eligible, p_NT, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        eligible &= best - p_NT <= tolerance
    # lexsort is stable, so that the pool's order breaks what ties remain.
    ranked = np.lexsort((-p_NT, np.where(eligible, cost_NT, np.inf), ~eligible), axis=1)
    return np.where(eligible.any(axis=1), ranked[:, 0], NO_TARGET)


def _per_prompt(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape not in (shape, shape[1:]):
        raise ValueError(f"{name} has shape {array.shape}, must be {shape[1:]} or {shape}")
    return np.broadcast_to(array, shape)
