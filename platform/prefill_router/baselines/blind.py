"""Baselines that ignore the prompt."""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prefill_router.baselines.base import Baseline, mean_outcomes, per_prompt
from prefill_router.metrics.curve import convex_hull

Array = NDArray[Any]


@dataclass
class Random(Baseline):
    """Chooses every target with the same probability; a tolerance shifts the choices to cheaper targets."""

    random_state: int = 0
    title = "random"
    reads = "nothing"

    def fit(self, x: Array, correct: Array) -> Self:
        self.num_targets_ = np.array(correct.shape[1])
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        return np.random.default_rng(self.random_state).random((len(x), int(self.num_targets_)))


@dataclass
class Always(Baseline):
    """Chooses one target for every prompt."""

    target: int
    title = "always"
    reads = "nothing"

    def fit(self, x: Array, correct: Array) -> Self:
        self.p_ = np.eye(correct.shape[1])[self.target]
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        return per_prompt(self.p_, x)


@dataclass
class Mixture(Baseline):
    """Mixes targets at random along the convex hull of cost and accuracy: the best router that ignores the prompt.

    `cost` (T,) is the mean cost of each target in training. As the tolerance grows from 0 to 1/2, choices move from the
    most accurate target to the cheapest one, at any time between two neighbours on the hull.
    """

    cost: Sequence[float]
    random_state: int = 0
    title = "mixture of two targets"
    reads = "nothing"

    def fit(self, x: Array, correct: Array) -> Self:
        points = np.column_stack([self.cost, mean_outcomes(correct)])
        hull = convex_hull(points)
        self.on_hull_ = np.array([np.flatnonzero((points == corner).all(1))[0] for corner in hull])
        self.num_targets_ = np.array(len(points))
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        tosses = np.random.default_rng(self.random_state).random((len(x), 1))
        num_steps = len(self.on_hull_) - 1
        p = np.zeros((len(x), int(self.num_targets_)))
        # At tolerance t, prompt i goes to hull corner floor(num_steps (1 - 2 t) + toss_i), counted by cost.
        gaps = 1.0 - (np.arange(1, num_steps + 1) - tosses) / max(num_steps, 1)
        p[:, self.on_hull_[:-1]] = 1.0 - gaps / 2.0
        p[:, self.on_hull_[-1]] = 1.0
        return p
