"""The calibration of P(correct), before and after a router's calibration maps."""

# N prompts, T targets

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prefill_router.metrics import expected_calibration_error, reliability_curve
from prefill_router.metrics.discrimination import has_partial_credit, ratio

Array = NDArray[Any]

_NUM_SIMULATIONS = 20


@dataclass(frozen=True)
class CalibrationSummary:
    """Calibration by target; every list has one entry per target."""

    ece: list[float]
    ece_uncalibrated: list[float]
    ece_of_chance: list[float]  # expected ECE of a perfectly calibrated router on as many prompts
    reliability: dict[str, list[list[list[float]]]]  # "uncalibrated" and "calibrated": rows of reliability_curve

    @classmethod
    def measure(cls, correct: Array, p: Array, p_uncalibrated: Array) -> Self:
        """Measures the calibration of `p` and `p_uncalibrated` (N, T); NaN in `correct` (N, T) is left out."""
        before, after = (_by_target(correct, values) for values in (p_uncalibrated, p))
        rng = np.random.default_rng(0)
        return cls(
            ece=[expected_calibration_error(*pair) for pair in after],
            ece_uncalibrated=[expected_calibration_error(*pair) for pair in before],
            ece_of_chance=[_ece_of_chance(*pair, rng) for pair in after],
            reliability={
                name: [reliability_curve(*pair).tolist() for pair in pairs]
                for name, pairs in (("uncalibrated", before), ("calibrated", after))
            },
        )

    @property
    def unchanged(self) -> list[bool]:
        """Whether calibration left P(correct) of each target unchanged."""
        before, after = (self.reliability[name] for name in ("uncalibrated", "calibrated"))
        return [old == new for old, new in zip(before, after, strict=True)]


def _by_target(correct: Array, p: Array) -> list[tuple[Array, Array]]:
    """The known outcomes of each target, with their predictions."""
    return [(y[~np.isnan(y)], p_t[~np.isnan(y)]) for y, p_t in zip(correct.T, p.T, strict=True)]


def _ece_of_chance(y: Array, p: Array, rng: np.random.Generator) -> float:
    """The mean ECE of outcomes simulated from the predictions.

    Rewards between 0 and 1 vary less than right and wrong answers do: their simulated errors are scaled accordingly.
    """
    is_judged = has_partial_credit(y)
    scale = np.sqrt(ratio(((y - p) ** 2).sum(), (p * (1.0 - p)).sum())) if is_judged else 1.0
    simulated = (p + scale * ((rng.random(len(p)) < p) - p) for _ in range(_NUM_SIMULATIONS))
    return float(np.mean([expected_calibration_error(outcomes, p) for outcomes in simulated]))
