from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from prefill_router.evaluation.learning_curve import LearnedFigure, learned, learning_curve
from prefill_router.metrics.discrimination import TargetScores
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS, fit_kernel

Array = NDArray[Any]
SIZES = [200, 400, 800, 1600]
SUBSETS = [8, 4, 2, 1]
NUM_DRAWS = 200


def power(num_prompts: Any, level: float, lack: float, exponent: float) -> Any:
    return level - lack * np.asarray(num_prompts, float) ** -exponent


def measured(means: Array, rng: np.random.Generator, training: float = 0.0, held_out: float = 0.0) -> list[Array]:
    """Values of a metric with these `means` (S,), with sampling noise from training prompts and from held-out ones."""
    common = np.concatenate([[rng.normal()], np.zeros(NUM_DRAWS)])
    common[1:] = common[0] + rng.normal(size=NUM_DRAWS)
    own = [np.append(e := rng.normal(), e + rng.normal(size=NUM_DRAWS)) for _ in SIZES]
    return [
        mean + training * rng.normal(size=(count, 1)) / np.sqrt(size) + held_out * (common + 0.1 * of_size)
        for mean, size, count, of_size in zip(means, SIZES, SUBSETS, own, strict=True)
    ]


def outlook_of(means: Array, **noise: float) -> LearnedFigure:
    rng = np.random.default_rng(0)
    return learned(SIZES, measured(means, rng, **noise), rng)


@pytest.mark.parametrize("exponent", [0.2, 0.5, 0.9])
def test_a_power_law_is_extrapolated(exponent: float) -> None:
    figure = outlook_of(power(SIZES, 0.8, 1.5, exponent))
    for outlook, times in zip(figure.outlooks, (2, 4), strict=True):
        assert (outlook.times, outlook.num_prompts) == (times, times * 1600)
        assert outlook.value == pytest.approx([power(times * 1600, 0.8, 1.5, exponent)] * 3, abs=1e-4)
        assert outlook.gain.value == pytest.approx(outlook.value.value - power(1600, 0.8, 1.5, exponent), abs=1e-4)
    assert figure.law[0][0] == 200.0
    assert figure.law[-1] == pytest.approx([6400, *figure.outlooks[1].value])


def test_the_law_is_the_weighted_least_squares_fit() -> None:
    """Against scipy's curve_fit, weighted by the prompts behind each mean."""
    values = power(SIZES, 0.8, 1.5, 0.4) + np.array([0.002, -0.003, 0.002, -0.001])
    weights = np.array(SIZES) * SUBSETS
    (level, lack, exponent), _ = curve_fit(power, SIZES, values, p0=(0.8, 1.5, 0.4), sigma=weights**-0.5)
    assert 0.05 < exponent < 1.0
    found = outlook_of(values).outlooks[1].value.value
    assert found == pytest.approx(power(6400, level, lack, exponent), abs=5e-4)


def test_an_outlook_is_between_half_of_the_last_doubling_and_all_of_it() -> None:
    straight = outlook_of(0.5 + 0.02 * np.log2(SIZES)).outlooks
    assert [o.gain.value for o in straight] == pytest.approx([0.02, 0.04], rel=0.1)
    assert all(o.gain.value < limit for o, limit in zip(straight, (0.02, 0.04), strict=True))
    saturated = outlook_of(power(SIZES, 0.8, 10.0, 1.0)).outlooks
    assert [o.gain.value for o in saturated] == pytest.approx([10.0 / 3200, 10.0 / 3200 * 1.5])


def test_intervals_contain_the_true_gain_of_more_prompts() -> None:
    truth = power([3200, 6400], 0.8, 1.5, 0.4) - power(1600, 0.8, 1.5, 0.4)
    held = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = learned(SIZES, measured(power(SIZES, 0.8, 1.5, 0.4), rng, training=0.1, held_out=0.01), rng).outlooks
        held.append([o.gain.low <= gain <= o.gain.high for o, gain in zip(found, truth, strict=True)])
    assert np.mean(held, axis=0) == pytest.approx([0.95, 0.95], abs=0.05)


def test_a_falling_metric_has_no_outlook() -> None:
    figure = outlook_of(power(SIZES, 0.8, -1.5, 0.4), training=0.01)
    assert "does not rise" in str(figure.silence)
    assert figure.law == figure.outlooks == []
    assert len(figure.measured) == len(SIZES)


def test_a_flat_metric_seldom_has_an_outlook() -> None:
    """Each end of a 95 % interval is wrong in 2.5 % of the cases."""
    num_told = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        num_told += learned(SIZES, measured(np.full(len(SIZES), 0.5), rng, training=0.5), rng).silence is None
    assert num_told <= 0.08 * 200


def test_an_undefined_metric_has_no_outlook() -> None:
    figure = outlook_of(np.full(len(SIZES), np.nan))
    assert "undefined" in str(figure.silence)
    assert np.isnan(figure.measured[0].value)


def prompts(num_prompts: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(num_prompts)
    x = rng.normal(size=(num_prompts, 6)).astype(np.float32)
    p = 1.0 / (1.0 + np.exp(-2.0 * np.sin(x[:, :1]) - x[:, 1:3] * 0.5))
    y = (rng.random(p.shape) < p).astype(np.float32)
    y[::17, 0] = np.nan
    return x, y


def test_the_kernel_machine_is_fitted_on_disjoint_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = prompts(640)
    (held_x, held_y), fitted = prompts(900), []

    def fit(features: Array, labels: list[Array]) -> Any:
        fitted.append(np.array([np.flatnonzero((x == row).all(1))[0] for row in features]))
        np.testing.assert_array_equal(labels, [y[fitted[-1]]])
        return fit_kernel(features, labels)

    def score(p: Array) -> dict[str, Array]:
        draws = np.random.default_rng(0).multinomial(900, np.full(900, 1 / 900), 40)
        weights = np.concatenate([np.ones((1, 900)), draws])
        known = ~np.isnan(held_y)
        aucs = [TargetScores(held_y[k, t], p[k, t]).auc(weights[:, k]) for t, k in enumerate(known.T)]
        return {"mean_auc": np.mean(aucs, axis=0)}

    monkeypatch.setattr("prefill_router.evaluation.learning_curve.fit_kernel", fit)
    curve = learning_curve(x, y, held_x, score)
    assert (curve.num_held_out, curve.sizes, curve.num_subsets) == (900, [80, 160, 320, 640], SUBSETS)
    assert [len(rows) for rows in fitted] == np.repeat(curve.sizes, SUBSETS).tolist()
    for size in curve.sizes:
        rows = np.concatenate([rows for rows in fitted if len(rows) == size])
        assert len(np.unique(rows)) == len(rows)
    figure = curve.figures["mean_auc"]
    whole = score(fit_kernel(x, [y])(held_x))["mean_auc"][0]
    assert figure.measured[-1].value == pytest.approx(whole, abs=1e-3)
    assert figure.measured[0].value < figure.measured[-1].value
    assert figure.outlooks[0].gain.low > 0.0


@pytest.mark.parametrize("num_prompts", [511, MAX_LANDMARKS + 1])
def test_too_few_prompts_or_too_many_have_no_curve(num_prompts: int) -> None:
    nothing = np.zeros((num_prompts, 1), np.float32)
    curve = learning_curve(nothing, nothing, nothing, lambda _: {})
    assert curve.silence is not None
    assert f"{num_prompts:,}" in curve.silence
    assert not curve.figures
