from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.kernel_ridge import KernelRidge

from prefill_router.predictor.kernel_ridge import STRENGTHS, KernelMachine, _Ridge, fit_and_leave_one_out, fit_kernel

Array = NDArray[np.float32]


def features(num_prompts: int, seed: int) -> Array:
    """Five features that are exact in float16, the type of landmarks."""
    return np.random.default_rng(seed).normal(size=(num_prompts, 5)).astype(np.float16).astype(np.float32)


def labels(x: Array, seed: int) -> Array:
    """Three outputs with a common curve, and noise."""
    shared = np.sin(2.0 * x[:, 0]) + x[:, 1] * x[:, 2]
    noise = np.random.default_rng(seed).normal(size=(len(x), 3))
    return (shared[:, None] + 0.3 * noise + np.array([0.0, 1.0, -2.0])).astype(np.float32)


def fitted_share(machine: KernelMachine, x: Array, y: Array) -> Array:
    """Returns the share (O,) of the outputs' variance that is explained."""
    return np.asarray(1.0 - ((machine(x) - y) ** 2).mean(0) / y.var(0))


def test_it_is_kernel_ridge_regression() -> None:
    """One output against scikit-learn's KernelRidge, with the strength picked by leave-one-out refits."""
    x, y = features(120, 0), labels(features(120, 0), 1)[:, :1]
    machine, without_itself = fit_and_leave_one_out(x, [y])
    gamma = 1.0 / np.sqrt(x.var(0, ddof=1).sum())
    kernel = np.exp(-np.sqrt(gamma * cdist(x, x)))
    centred = (y - y.mean())[:, 0]

    def left_out(strength: float) -> Array:
        predicted = []
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            ridge = KernelRidge(alpha=strength, kernel="precomputed").fit(kernel[np.ix_(rest, rest)], centred[rest])
            predicted.append(ridge.predict(kernel[[i]][:, rest])[0])
        return np.array(predicted)

    best = min(STRENGTHS, key=lambda strength: float(np.mean((left_out(strength) - centred) ** 2)))
    np.testing.assert_allclose(without_itself[:, 0], left_out(best) + y.mean(), atol=1e-3)
    ridge = KernelRidge(alpha=best, kernel="precomputed").fit(kernel, centred)
    test = features(30, 2)
    expected = ridge.predict(np.exp(-np.sqrt(gamma * cdist(test, x)))) + y.mean()
    np.testing.assert_allclose(machine(test)[:, 0], expected, atol=1e-3)


def test_every_component_takes_its_own_strength() -> None:
    x = features(400, 0)
    y = torch.from_numpy(np.column_stack([np.sin(x[:, 0]), np.random.default_rng(1).normal(size=400)]))
    kernel = torch.from_numpy(np.exp(-cdist(x, x)))
    told, noise = _Ridge(kernel).best_strengths(y).tolist()
    assert told == STRENGTHS[0]
    assert noise >= STRENGTHS[-1]


def test_what_features_tell_is_learnt_and_outputs_help_each_other() -> None:
    x, test = features(600, 0), features(400, 3)
    y, truth = labels(x, 1), labels(test, 4)
    together = fitted_share(fit_kernel(x, [y]), test, truth)
    assert (together > 0.55).all()
    alone = np.concatenate([fitted_share(fit_kernel(x, [y[:, [t]]]), test, truth[:, [t]]) for t in range(3)])
    assert together.mean() > alone.mean()


def test_groups_do_not_meddle_with_each_other() -> None:
    x = features(200, 0)
    y = labels(x, 1)
    other = (100.0 * np.random.default_rng(5).normal(size=(200, 2))).astype(np.float32)
    both, alone = fit_kernel(x, [y, other])(x), fit_kernel(x, [y])(x)
    np.testing.assert_allclose(both[:, :3], alone, atol=1e-3)


@pytest.mark.parametrize("missing", [0.2, 0.6])
def test_missing_labels_are_not_the_mean(missing: float) -> None:
    x, test = features(900, 0), features(400, 3)
    y, truth = labels(x, 1), labels(test, 4)
    gaps = np.random.default_rng(2).random(y.shape) < missing
    gapped = np.where(gaps, np.float32(np.nan), y)
    filled = np.where(gaps, np.nanmean(gapped, axis=0), y)
    left, read_as_mean = (fitted_share(fit_kernel(x, [given]), test, truth) for given in (gapped, filled))
    assert (left > read_as_mean + 0.1 * missing).all()
    assert (left > 0.55).all()


def test_an_output_without_labels_has_the_mean_of_its_group() -> None:
    x = features(50, 0)
    y = labels(x, 1)
    y[:, 1] = np.nan
    machine = fit_kernel(x, [y])
    assert np.isfinite(machine(x)).all()
    assert machine.mean[1] == pytest.approx((y[:, 0].mean() + y[:, 2].mean()) / 2, abs=1e-4)


def test_prompts_that_repeat_do_no_harm() -> None:
    x = np.repeat(features(40, 0), 4, axis=0)
    assert np.isfinite(fit_kernel(x, [labels(x, 1)])(x)).all()


def test_an_infinite_strength_leaves_the_labels() -> None:
    y = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    residuals = _Ridge(torch.eye(2)).residuals(y, torch.tensor([torch.inf, 1.0]))
    assert residuals.tolist() == [[1.0, 1.0], [-1.0, -1.0]]  # prompts that have nothing in common predict the mean too


def test_prompts_that_are_all_alike_leave_the_mean() -> None:
    x, y = np.ones((30, 5), np.float32), labels(features(30, 0), 1)
    np.testing.assert_allclose(fit_kernel(x, [y])(x), np.tile(y.mean(0), (30, 1)), atol=0.05)


def test_outputs_are_taken_and_joined() -> None:
    x = features(60, 0)
    machine = fit_kernel(x, [labels(x, 1)])
    first, rest = machine.of_outputs([2]), machine.of_outputs([0, 1])
    np.testing.assert_allclose(first.joined(rest)(x), machine(x)[:, [2, 0, 1]], atol=1e-5)


def test_a_constant_needs_no_landmarks() -> None:
    machine = KernelMachine.constant(np.array([1.5, 2.5], np.float32), 5)
    np.testing.assert_array_equal(machine(features(3, 0)), [[1.5, 2.5]] * 3)
    assert machine(features(0, 0)).shape == (0, 2)


def test_tensors_round_trip() -> None:
    x = features(40, 0)
    machine = fit_kernel(x, [labels(x, 1)])
    again = KernelMachine.from_tensors(machine.tensors())
    np.testing.assert_array_equal(again(x), machine(x))
