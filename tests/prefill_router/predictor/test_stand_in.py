"""Tests of the features that stand in for a missing encoder."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_router.predictor.stand_in import STRENGTHS, StandIn


def related(num_prompts: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    present = rng.normal(size=(num_prompts, 6)) + 3.0
    missing = present @ rng.normal(size=(6, 4)) + noise * rng.normal(size=(num_prompts, 4)) - 1.0
    return present, missing


def test_features_that_follow_from_the_others_are_found() -> None:
    present, missing = related(400, noise=0.0)
    assert np.allclose(StandIn.fit(present, missing)(present.astype(np.float32)), missing, atol=0.01)


@pytest.mark.parametrize("noise", [0.1, 30.0])
def test_the_strength_is_the_best_of_leaving_each_prompt_out(noise: float) -> None:
    present, missing = related(40, noise)
    scale = np.linalg.eigvalsh(np.cov(present.T, bias=True) * len(present)).mean()

    def solved(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
        centred = x - x.mean(0)
        return np.asarray(
            np.linalg.solve(centred.T @ centred + strength * scale * np.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
        )

    def error(strength: float) -> float:
        left_out = []
        for i in range(len(present)):
            x, y = np.delete(present, i, 0), np.delete(missing, i, 0)
            left_out.append(missing[i] - y.mean(0) - (present[i] - x.mean(0)) @ solved(x, y, strength))
        return float(np.square(left_out).mean())

    best = solved(present, missing, min(STRENGTHS, key=error))
    assert np.allclose(StandIn.fit(present, missing).weights, best, atol=1e-5)


def test_without_prompts_the_mean_stands_in() -> None:
    stand_in = StandIn.fit(np.empty((0, 6)), np.empty((0, 4)))
    assert stand_in(np.ones((3, 6), np.float32)).tolist() == [[0.0] * 4] * 3
