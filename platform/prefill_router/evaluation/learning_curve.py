"""Learning curve of the kernel machine: its metrics by the number of training prompts, extrapolated to more prompts.

The kernel machine is fitted, hyperparameters included, on disjoint halves, quarters and eighths of the training
prompts. A power law of their number (Hestness et al., 2017, arXiv 1712.00409) is fitted to its metrics, and evaluated
at two and four times as many prompts.
"""

# N training prompts, V held-out prompts, F features, T targets, S sizes, B draws (the first takes every prompt once)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.console import doing
from prefill_router.metrics import Interval, interval_from_draws
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS, fit_kernel

Array = NDArray[Any]
Score = Callable[[Array], Mapping[str, Array]]  # maps P(correct) (V, T) of the held-out prompts to metrics, each (B,)

TIMES = (2, 4)  # multiples of the training prompts at which the law is evaluated
MIN_PROMPTS = 512
_HALVINGS = 3
_MAX_SUBSETS = 8  # of one size
# At the smallest exponent, nearly a logarithm, every doubling brings the same gain; at the largest, half of the one
# before. The predicted gain of a doubling is thus between half of the last doubling's gain and all of it.
_EXPONENTS = np.linspace(0.05, 1.0, 96)
_LAW_POINTS = 4  # points per doubling at which the law is drawn


@dataclass(frozen=True)
class Outlook:
    """The power law at `times` the training prompts."""

    times: int
    num_prompts: int
    value: Interval
    gain: Interval


@dataclass(frozen=True)
class LearnedFigure:
    """One metric by the number of training prompts."""

    measured: list[Interval]  # (S,) mean over the subsets of each size
    law: list[list[float]] = field(default_factory=list)  # (prompts, value, low, high)
    outlooks: list[Outlook] = field(default_factory=list)  # one for each of TIMES
    silence: str | None = None  # the reason if there is neither law nor outlook


@dataclass(frozen=True)
class LearningCurve:
    """Metrics by the number of training prompts; intervals cover the sampling of held-out and of training prompts."""

    num_held_out: int = 0
    sizes: list[int] = field(default_factory=list)  # (S,) numbers of prompts, ascending; the last is all of them
    num_subsets: list[int] = field(default_factory=list)  # (S,) disjoint subsets of each size
    figures: dict[str, LearnedFigure] = field(default_factory=dict)
    silence: str | None = None  # the reason if there is no curve


@doing("computing the learning curve")
def learning_curve(features: Array, correct: Array, held_out: Array, score: Score, seed: int = 0) -> LearningCurve:
    """The curve of training `features` (N, F) and outcomes `correct` (N, T), NaN where missing.

    `score` evaluates the predictions for the features `held_out` (V, F).
    """
    num_prompts = len(features)
    if not MIN_PROMPTS <= num_prompts <= MAX_LANDMARKS:
        silence = f"a learning curve needs {MIN_PROMPTS} to {MAX_LANDMARKS:,} training prompts, not {num_prompts:,}"
        return LearningCurve(silence=silence)
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_prompts)
    sizes = [num_prompts >> k for k in range(_HALVINGS, -1, -1)]
    subsets = [[order[i * m : (i + 1) * m] for i in range(min(num_prompts // m, _MAX_SUBSETS))] for m in sizes]

    def scored(rows: Array) -> Mapping[str, Array]:
        return score(fit_kernel(features[rows], [correct[rows]])(held_out))

    scores = [[scored(rows) for rows in of_size] for of_size in subsets]
    names = scores[0][0]
    return LearningCurve(
        num_held_out=len(held_out),
        sizes=sizes,
        num_subsets=[len(of_size) for of_size in subsets],
        figures={
            name: learned(sizes, [np.stack([s[name] for s in of_size]) for of_size in scores], rng) for name in names
        },
    )


def learned(sizes: Sequence[int], values: Sequence[Array], rng: np.random.Generator) -> LearnedFigure:
    """One metric, from its `values` (subsets, B) at each size."""
    numbers = np.array(sizes, np.float64)
    counts = np.array([len(of_size) for of_size in values])
    means = np.stack([of_size.mean(0) for of_size in values], axis=1)  # (B, S)
    # The spread between subsets of one size estimates the noise from the choice of training prompts.
    squares = sum(m * ((v[:, 0] - v[:, 0].mean()) ** 2).sum() for m, v in zip(numbers, values, strict=True))
    noise = np.sqrt(squares / (counts - 1).sum() / (numbers * counts))
    means[1:] += rng.standard_normal(means[1:].shape) * noise
    measured = [interval_from_draws(of_size) for of_size in means.T]
    is_finite = np.isfinite(means).all(1)
    if not is_finite[0]:
        return LearnedFigure(measured, silence="it is undefined on these prompts")
    means = means[is_finite]
    law = _PowerLaw.fit(numbers, means, counts * numbers)
    rise = interval_from_draws(law(numbers[-1]) - law(numbers[0]))
    if not rise.low > 0.0:
        return LearnedFigure(measured, silence="it does not rise significantly with the number of prompts")
    extended = numbers[-1] * 2.0 ** (np.arange(-_HALVINGS * _LAW_POINTS, 2 * _LAW_POINTS + 1) / _LAW_POINTS)
    return LearnedFigure(
        measured=measured,
        law=[[number, *interval_from_draws(law(number))] for number in extended],
        outlooks=[
            Outlook(
                times=times,
                num_prompts=times * sizes[-1],
                value=interval_from_draws(law(times * numbers[-1])),
                gain=interval_from_draws(law(times * numbers[-1]) - law(numbers[-1])),
            )
            for times in TIMES
        ],
    )


@dataclass(frozen=True)
class _PowerLaw:
    """level - lack * (prompts / num_all) ** -exponent, with parameters (B,)."""

    num_all: float
    level: Array
    lack: Array
    exponent: Array

    @classmethod
    def fit(cls, sizes: Array, values_BS: Array, weights: Array) -> _PowerLaw:
        """Fits by weighted least squares: a linear fit for each exponent, of which the best is kept."""
        roots = np.sqrt(weights)
        powers = (sizes / sizes[-1]) ** -_EXPONENTS[:, None]
        designs = np.stack([np.ones_like(powers), -powers], axis=2) * roots[:, None]  # (exponents, S, 2)
        solutions = np.linalg.pinv(designs) @ (values_BS * roots).T  # (exponents, 2, B)
        errors = ((designs @ solutions - (values_BS * roots).T) ** 2).sum(1)
        best = errors.argmin(0)
        level, lack = solutions[best, :, np.arange(len(values_BS))].T
        return cls(float(sizes[-1]), level, lack, _EXPONENTS[best])

    def __call__(self, num_prompts: float) -> Array:
        return np.asarray(self.level - self.lack * (num_prompts / self.num_all) ** -self.exponent)
