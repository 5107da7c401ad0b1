from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from prefill_router.predictor.stacking import WEIGHTS, best_weight, stacked

Array = NDArray[np.float32]


def truth(seed: int = 0) -> tuple[Array, Array]:
    """Returns P(correct) and outcomes of 4,000 prompts and two targets."""
    rng = np.random.default_rng(seed)
    p = rng.beta(2.0, 2.0, (4000, 2))
    return p.astype(np.float32), (rng.random(p.shape) < p).astype(np.float32)


def noisy(p: Array, scale: float, seed: int) -> Array:
    logits = np.log(p / (1 - p)) + scale * np.random.default_rng(seed).normal(size=p.shape)
    return (1.0 / (1.0 + np.exp(-logits))).astype(np.float32)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_log_odds_are_averaged(weight: float) -> None:
    a, b = np.array([[0.2, 0.9]], np.float32), np.array([[0.6, 0.3]], np.float32)
    odds = (a / (1 - a)) ** (1 - weight) * (b / (1 - b)) ** weight
    np.testing.assert_allclose(stacked(a, b, weight), odds / (1 + odds), rtol=1e-5)


def test_without_weight_the_trunk_is_untouched() -> None:
    p = np.array([[0.0001, 0.5]], np.float32)
    np.testing.assert_array_equal(stacked(p, np.array([[0.5, 0.5]]), 0.0), p)


def test_what_leaves_zero_to_one_stays_a_probability() -> None:
    p = stacked(np.full((1, 2), 0.5, np.float32), np.array([[-3.0, 7.0]]), 1.0)
    assert ((p > 0.0) & (p < 1.0)).all()
    assert p[0, 0] < 0.05 < 0.95 < p[0, 1]


def test_the_better_one_gets_the_weight_and_equals_share_it() -> None:
    p, correct = truth()
    good, bad = noisy(p, 0.1, 1), noisy(p, 3.0, 2)
    assert best_weight(good, bad, correct) == WEIGHTS[0]
    assert best_weight(bad, good, correct) == WEIGHTS[-1]
    assert best_weight(noisy(p, 1.0, 3), noisy(p, 1.0, 4), correct) == 0.5


def test_missing_outcomes_do_not_count() -> None:
    p, correct = truth()
    good, bad = noisy(p, 0.1, 1), noisy(p, 3.0, 2)
    correct[2000:] = np.nan
    bad[2000:], good[2000:] = good[2000:], bad[2000:]
    assert best_weight(good, bad, correct) == WEIGHTS[0]
