"""A learning curve: what a router's cheap learner tells after fewer and fewer prompts, and what more would bring.

The kernel machine is fitted anew on halves, quarters and eighths of the training prompts, with all that it
chooses chosen on them alone. What it lacks falls as a power of their number (Hestness et al., 2017, arXiv 1712.00409),
and that law is read at twice and four times as many.
"""

# N training prompts, V held-out ones, F features, T targets, S sizes, B draws (the first takes every prompt once)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.metrics import Interval, interval
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS, fit_kernel

Array = NDArray[Any]
Score = Callable[[Array], Mapping[str, Array]]  # P(correct) (V, T) of the held-out prompts to figures, each (B,)

TIMES = (2, 4)  # as many prompts
MIN_PROMPTS = 512
_HALVINGS = 3
_MOST_SUBSETS = 8  # of one size
# Of the law. The first is next to a logarithm, by which each doubling brings the same; the last brings a half of the
# one before. An outlook on twice as many thus lies between a half of the last doubling's gain and all of it.
_EXPONENTS = np.linspace(0.05, 1.0, 96)
_LAW_POINTS = 4  # to a doubling, where the law is drawn


@dataclass(frozen=True)
class Outlook:
    """What so many times the prompts would bring."""

    times: int
    num_prompts: int
    value: Interval
    gain: Interval


@dataclass(frozen=True)
class LearnedFigure:
    """One figure by the number of prompts."""

    measured: list[Interval]  # at each size, of the mean over its subsets
    law: list[list[float]]  # (prompts, value, low, high), beyond the prompts at hand
    outlooks: list[Outlook]
    silence: str | None  # why there is neither law nor outlook


@dataclass(frozen=True)
class LearningCurve:
    """Intervals hold the chance of the held-out prompts' draw and that of the training prompts' draw."""

    num_held_out: int
    sizes: list[int]  # (S,) numbers of prompts, ascending; the last are all at hand
    num_subsets: list[int]  # (S,) apart from each other
    figures: dict[str, LearnedFigure]
    silence: str | None = None  # why there is no curve

    @classmethod
    def silent(cls, why: str) -> LearningCurve:
        return cls(0, [], [], {}, why)


def learning_curve(features: Array, correct: Array, held_out: Array, score: Score, seed: int = 0) -> LearningCurve:
    """Of `features` (N, F) and outcomes `correct` (N, T), NaN where missing; judged by `score` on `held_out` (V, F)."""
    num_prompts = len(features)
    if not MIN_PROMPTS <= num_prompts <= MAX_LANDMARKS:
        return LearningCurve.silent(
            f"a kernel machine's learning curve takes {MIN_PROMPTS} to {MAX_LANDMARKS:,} training prompts, and there "
            f"are {num_prompts:,}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_prompts)
    sizes = [num_prompts >> k for k in range(_HALVINGS, -1, -1)]
    subsets = [[order[i * m : (i + 1) * m] for i in range(min(num_prompts // m, _MOST_SUBSETS))] for m in sizes]

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
    """One figure, of its `values` at each size (subsets, B)."""
    numbers = np.array(sizes, np.float64)
    counts = np.array([len(of_size) for of_size in values])
    means = np.stack([of_size.mean(0) for of_size in values], axis=1)  # (B, S)
    # Other prompts would have taught otherwise: by how much, subsets of one size tell by their differences.
    squares = sum(m * ((v[:, 0] - v[:, 0].mean()) ** 2).sum() for m, v in zip(numbers, values, strict=True))
    noise = np.sqrt(squares / (counts - 1).sum() / (numbers * counts))
    means[1:] += rng.standard_normal(means[1:].shape) * noise
    measured = [_interval(of_size) for of_size in means.T]
    is_finite = np.isfinite(means).all(1)
    if not is_finite[0]:
        return LearnedFigure(measured, [], [], "it has no value on these prompts")
    means = means[is_finite]
    law = _Law.fit(numbers, means, counts * numbers)
    rise = _interval(law(numbers[-1]) - law(numbers[0]))
    if not rise.low > 0.0:
        return LearnedFigure(measured, [], [], "on these prompts its curve cannot be told from one that does not rise")
    places = numbers[-1] * 2.0 ** (np.arange(-_HALVINGS * _LAW_POINTS, 2 * _LAW_POINTS + 1) / _LAW_POINTS)
    return LearnedFigure(
        measured=measured,
        law=[[place, *_interval(law(place))] for place in places],
        outlooks=[
            Outlook(
                times=times,
                num_prompts=times * sizes[-1],
                value=_interval(law(times * numbers[-1])),
                gain=_interval(law(times * numbers[-1]) - law(numbers[-1])),
            )
            for times in TIMES
        ],
        silence=None,
    )


@dataclass(frozen=True)
class _Law:
    """level - lack * (prompts / all) ** -exponent, each (B,)."""

    num_all: float
    level: Array
    lack: Array
    exponent: Array

    @classmethod
    def fit(cls, sizes: Array, values_BS: Array, weights: Array) -> _Law:
        """By weighted least squares: linear for each exponent, of which the best is taken."""
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


def _interval(values: Array) -> Interval:
    return interval(float(values[0]), values[1:])
