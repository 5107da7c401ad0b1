from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from prefill_router.evaluation.calibration_summary import CalibrationSummary
from prefill_router.metrics import score_routing

Array = NDArray[np.float64]


def outcomes(num_prompts: int, missing: float = 0.0) -> tuple[Array, Array]:
    """Outcomes (N, 3), some missing, and P(correct) (N, 3) with a little noise."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.02, 0.98, (num_prompts, 3))
    correct = (rng.random(chances.shape) < chances).astype(float)
    correct[rng.random(chances.shape) < missing] = np.nan
    return correct, np.clip(chances + rng.normal(0, 0.1, chances.shape), 0, 1)


def test_targets_that_calibration_left_unchanged_are_reported() -> None:
    correct, p = outcomes(200, missing=0.1)
    before = p.copy()
    assert CalibrationSummary.measure(correct, p, before).unchanged == [True] * 3
    before[:, 1] **= 2
    assert CalibrationSummary.measure(correct, p, before).unchanged == [True, False, True]


def test_calibration_is_reported_before_and_after_and_by_chance() -> None:
    correct, p = outcomes(2000)
    calibration = CalibrationSummary.measure(correct, p, np.clip(p * 0.5, 0, 1))
    assert calibration.ece == pytest.approx(score_routing(correct, p, [3.0, 2.0, 1.0]).ece)
    assert (np.array(calibration.ece_uncalibrated) > np.array(calibration.ece)).all()
    assert (np.array(calibration.ece_of_chance) < 0.05).all()
    assert [len(calibration.reliability[name]) for name in ("uncalibrated", "calibrated")] == [3, 3]


def test_rewards_that_vary_less_than_right_and_wrong_do_leave_less_to_chance() -> None:
    correct, p = outcomes(2000)
    rewards = p + 0.1 * (correct - p)
    judged = CalibrationSummary.measure(rewards, p, p)
    assert judged.ece_of_chance == pytest.approx(
        [0.1 * ece for ece in CalibrationSummary.measure(correct, p, p).ece_of_chance], rel=0.25
    )
    assert judged.ece == pytest.approx([0.1 * ece for ece in CalibrationSummary.measure(correct, p, p).ece])
