from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from prefill_router.predictor.calibration import (
    KINDS,
    MIN_OUTCOMES,
    Calibration,
    Kind,
    Knots,
    fit_calibration,
    fit_isotonic,
    fit_platt,
    fit_temperature,
)

Array = NDArray[np.float64]
Distortion = Callable[[Array], Array]

# Maps predicted logits to true ones.
DISTORTIONS: dict[Kind, Distortion] = {
    "identity": lambda z: z,
    "temperature": lambda z: 0.4 * z,
    "platt": lambda z: 0.6 * z - 1.0,
    "isotonic": lambda z: np.where(z > 0.0, 2.5 * z, 0.1 * z) - 0.5,
}


def sigmoid(z: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-z)))


def said_and_true(kind: Kind, num_prompts: int, seed: int = 0) -> tuple[Array, Array]:
    """Returns distorted predictions (N,) and outcomes (N,)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.0, 1.5, num_prompts)
    return sigmoid(z), (rng.random(num_prompts) < sigmoid(DISTORTIONS[kind](z))).astype(np.float64)


def apply(knots: Knots, p: Array, kind: Kind = "platt") -> Array:
    return np.asarray(Calibration.of([(kind, knots)])(p[:, None])[:, 0], np.float64)


def logits(p: Array) -> Array:
    return np.log(p / (1.0 - p))


# --- the kinds, against scikit-learn -----------------------------------------------------------------------------


def test_platt_is_scikit_learns_sigmoid_calibration() -> None:
    """Both smooth the labels as Platt does."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 1))
    y = (rng.random(1500) < sigmoid(0.7 * x[:, 0] - 0.4)).astype(int)
    trained = LogisticRegression(C=1e-3).fit(x, y)
    reference = CalibratedClassifierCV(FrozenEstimator(trained), method="sigmoid").fit(x, y)
    p = trained.predict_proba(x)[:, 1]
    ours = apply(fit_platt(logits(p), y.astype(np.float64)), p)
    # Theirs is the mean of five fits, each on four fifths of the prompts.
    np.testing.assert_allclose(ours, reference.predict_proba(x)[:, 1], atol=1e-2)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["temperature", "platt", "isotonic"])
def test_lines_are_those_of_logistic_regression(kind: Kind, has_bias: bool) -> None:
    """Fractional outcomes count in both classes. Slope and bias agree within 1e-3."""
    p, y = said_and_true(kind, 900)
    y = np.where(np.arange(900) % 3, y, 0.25 + 0.5 * y)
    knots = (fit_platt if has_bias else fit_temperature)(logits(p), y)
    right, wrong = y.sum(), (1.0 - y).sum()
    labels = y * (right + 1.0) / (right + 2.0) + (1.0 - y) / (wrong + 2.0)
    reference = LogisticRegression(C=1e6, fit_intercept=has_bias, tol=1e-8, max_iter=1000)
    reference.fit(
        np.tile(logits(p), 2)[:, None], np.repeat([1, 0], 900), sample_weight=np.concatenate([labels, 1.0 - labels])
    )
    slope = (knots.y[-1] - knots.y[0]) / (knots.x[-1] - knots.x[0])
    assert slope == pytest.approx(reference.coef_[0, 0], abs=1e-3)
    assert knots.y[0] - slope * knots.x[0] == pytest.approx(reference.intercept_[0] if has_bias else 0.0, abs=1e-3)


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_isotonic_follows_scikit_learns_without_its_plateaus(kind: Kind) -> None:
    """On 6,000 prompts the mean distance from its steps is below 0.02, and predictions do not tie."""
    p, y = said_and_true(kind, 6000)
    ours = apply(fit_isotonic(logits(p), y), p, "isotonic")
    steps = IsotonicRegression(out_of_bounds="clip").fit_transform(p, y)
    assert np.abs(ours - steps).mean() < 0.02
    assert len(np.unique(steps)) < 100
    assert len(np.unique(ours)) > 0.99 * len(np.unique(p.astype(np.float32)))


# --- the choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_the_kind_that_fits_is_found(kind: Kind) -> None:
    p, y = said_and_true(kind, 4000)
    assert fit_calibration(p[:, None], y[:, None]).kinds == (kind,)


@pytest.mark.parametrize("num_prompts", [150, 600, 3000])
@pytest.mark.parametrize("kind", DISTORTIONS)
def test_fresh_log_loss_is_never_much_worse_and_better_where_it_was_off(kind: Kind, num_prompts: int) -> None:
    p, y = said_and_true(kind, num_prompts)
    fresh_p, fresh_y = said_and_true(kind, 20_000, seed=1)
    calibrated = fit_calibration(p[:, None], y[:, None])(fresh_p[:, None])[:, 0].astype(np.float64)
    gain = log_loss(fresh_y, fresh_p) - log_loss(fresh_y, calibrated)
    assert gain > (-0.003 if kind == "identity" else 0.03)


def test_calibrated_predictions_are_mostly_left_alone() -> None:
    """The rule of one standard error keeps most of them, and none changes by more than 0.06 on average."""
    data = [said_and_true("identity", 500, seed) for seed in range(40)]
    p, y = (np.stack(columns, axis=1) for columns in zip(*data, strict=True))
    calibration = fit_calibration(p, y)
    calibrated = calibration(p)
    kept = np.array(calibration.kinds) == "identity"
    assert kept.mean() >= 0.75
    np.testing.assert_array_equal(calibrated[:, kept], p[:, kept].astype(np.float32))
    assert np.abs(calibrated - p).mean(0).max() < 0.06


@pytest.mark.parametrize(
    "y",
    [
        pytest.param(np.zeros(500), id="never right"),
        pytest.param(np.ones(500), id="always right"),
        pytest.param(np.full(500, np.nan), id="no outcome"),
        pytest.param(np.where(np.arange(500) < MIN_OUTCOMES - 1, 1.0, 0.0), id="too rarely right"),
        pytest.param(np.where(np.arange(500) < 12, np.arange(500) % 2, np.nan), id="too few outcomes"),
    ],
)
def test_a_target_with_few_outcomes_is_left_alone(y: Array) -> None:
    p, _ = said_and_true("platt", 500)
    other_p, other_y = said_and_true("platt", 500)
    calibration = fit_calibration(np.stack([p, other_p], 1), np.stack([y, other_y], 1))
    assert calibration.kinds[0] == "none"
    assert calibration.kinds[1] != "none"
    np.testing.assert_array_equal(calibration(np.stack([p, p], 1))[:, 0], p.astype(np.float32))


def test_a_missing_outcome_says_nothing() -> None:
    p, y = said_and_true("platt", 800)
    y[::4] = np.nan
    moved = np.where(np.isnan(y), 0.99, p)
    for a, b in zip(
        fit_calibration(p[:, None], y[:, None]).tensors().values(),
        fit_calibration(moved[:, None], y[:, None]).tensors().values(),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_each_target_is_calibrated_as_if_alone() -> None:
    data = [said_and_true(kind, 3000) for kind in DISTORTIONS]
    p, y = (np.stack(columns, axis=1) for columns in zip(*data, strict=True))
    together = fit_calibration(p, y)
    assert together.kinds == tuple(DISTORTIONS)
    for t in range(p.shape[1]):
        alone = fit_calibration(p[:, [t]], y[:, [t]])
        np.testing.assert_allclose(together(p)[:, [t]], alone(p[:, [t]]), atol=1e-6)


# --- what every calibration is -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(KINDS[1:])), st.floats(0.05, 8.0), st.floats(-4.0, 4.0))
def test_calibration_keeps_order_and_stays_inside_0_and_1(seed: int, kind: Kind, scale: float, bias: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(bias, scale, 200)
    y = rng.random(200) if seed % 2 else (rng.random(200) < sigmoid(rng.normal(0, 2) * x)).astype(float)
    fits = {"temperature": fit_temperature, "platt": fit_platt, "isotonic": fit_isotonic}
    calibration = Calibration.of([(kind, fits[kind](x, y))]) if kind in fits else Calibration.identity(1)
    p = np.concatenate([[0.0, 1e-9], sigmoid(np.linspace(-12.0, 12.0, 400)), [1.0 - 1e-9, 1.0]]).astype(np.float32)
    calibrated = calibration(p[:, None])[:, 0]
    assert calibrated.dtype == np.float32
    assert (np.diff(calibrated.astype(np.float64)) >= -1e-7).all()
    if kind in fits:
        assert (calibrated > 0.0).all()
        assert (calibrated < 1.0).all()


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_platt_leaves_the_auc_as_it_was(kind: Kind) -> None:
    p, y = said_and_true(kind, 1000)
    assert roc_auc_score(y, apply(fit_platt(logits(p), y), p)) == pytest.approx(roc_auc_score(y, p), abs=1e-6)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(np.full(100, 0.3), np.arange(100) % 2, id="all alike"),
        pytest.param(np.linspace(-3, 3, 100), np.arange(100) >= 50, id="separable"),
        pytest.param(np.linspace(-3, 3, 100), np.arange(100) < 50, id="the wrong way round"),
        pytest.param(np.where(np.arange(100) % 2, 13.8, -13.8), np.arange(100) % 4 < 2, id="sure and wrong"),
        pytest.param(np.array([0.5, -0.5]), np.array([1.0, 0.0]), id="two prompts"),
    ],
)
@pytest.mark.parametrize("fit", [fit_temperature, fit_platt, fit_isotonic])
def test_odd_outcomes_have_finite_increasing_knots(fit: Callable[[Array, Array], Knots], x: Array, y: Array) -> None:
    knots = fit(x, y.astype(np.float64))
    for side in knots:
        assert np.isfinite(side).all()
        assert (np.diff(side) > 0.0).all()


def test_predictions_that_tell_nothing_become_the_base_rate() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.random((3000, 1)), (rng.random((3000, 1)) < 0.3).astype(np.float64)
    calibrated = fit_calibration(p, y)(p)
    np.testing.assert_allclose(calibrated, 0.3, atol=0.06)
    assert roc_auc_score(y, calibrated) == pytest.approx(roc_auc_score(y, p), abs=0.02)


def test_identity_changes_nothing() -> None:
    p = np.array([[0.0, 0.25], [1.0, 1e-12]], np.float32)
    np.testing.assert_array_equal(Calibration.identity(2)(p), p)
    assert Calibration.identity(2)(p[:0]).shape == (0, 2)


def test_a_prompt_of_ten_targets_takes_well_under_a_millisecond() -> None:
    """Every decision pays this: about 0.04 ms on an EPYC."""
    p, y = said_and_true("isotonic", 2000)
    calibration = Calibration.of([("isotonic", fit_isotonic(logits(p), y))] * 10)
    row, times = np.full((1, 10), 0.3, np.float32), []
    for _ in range(50):
        start = time.thread_time()
        calibration(row)
        times.append(time.thread_time() - start)
    assert np.median(times) < 1e-3


# --- the artifact ------------------------------------------------------------------------------------------------


def fitted() -> Calibration:
    data = [said_and_true(kind, 3000) for kind in DISTORTIONS]
    p, y = (np.stack(columns, axis=1) for columns in zip(*data, strict=True))
    return fit_calibration(p, y)


def test_tensors_are_flat_and_bring_it_back() -> None:
    calibration, p = fitted(), np.random.default_rng(3).random((50, 4)).astype(np.float32)
    again = Calibration.from_tensors(calibration.tensors())
    assert again.kinds == calibration.kinds
    np.testing.assert_array_equal(again(p), calibration(p))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, :-1], r"must be \(T,\), \(T, Q\), \(T, Q\)"),
        ("x", lambda x: x[0], r"must be \(T,\)"),
        ("x", lambda x: x[:, ::-1], "must be finite and strictly increasing"),
        ("y", lambda y: np.where(y > 0.0, np.nan, y), "must be finite and strictly increasing"),
        ("y", np.zeros_like, "must be finite and strictly increasing"),
        ("kinds", lambda kinds: kinds[1:], r"must be \(T,\)"),
        ("kinds", lambda kinds: kinds + 9, r"must be uint8 below 5"),
        ("kinds", lambda kinds: kinds.astype(np.float32), r"must be uint8 below 5"),
    ],
)
def test_tensors_that_are_no_calibration_are_refused(
    name: str, change: Callable[[NDArray[Any]], NDArray[Any]], message: str
) -> None:
    tensors = fitted().tensors()
    with pytest.raises(ValueError, match=message):
        Calibration.from_tensors({**tensors, name: change(tensors[name])})


@pytest.mark.parametrize("name", ["kinds", "x", "y"])
def test_tensors_that_are_missing_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        Calibration.from_tensors({key: value for key, value in fitted().tensors().items() if key != name})


@pytest.mark.parametrize(
    ("p", "correct", "num_folds", "message"),
    [
        (np.ones(3), np.ones(3), 5, r"must both be \(prompts, targets\)"),
        (np.ones((3, 2)), np.ones((3, 1)), 5, r"must both be \(prompts, targets\)"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), 5, "p_correct must not be NaN"),
        (np.ones((3, 2)), np.ones((3, 2)), 1, "num_folds = 1, must be >= 2"),
    ],
)
def test_bad_arguments_are_refused(p: Array, correct: Array, num_folds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(p, correct, num_folds)
