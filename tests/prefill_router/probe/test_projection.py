from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from prefill_router.common.schema import ActivationColumn
from prefill_router.probe import projection as projection_module
from prefill_router.probe.moments import Moments
from prefill_router.probe.projection import (
    EXPLAINED_VARIANCE,
    MAX_FEATURES,
    MIN_FEATURES,
    WHITEN_FLOOR,
    Projection,
    fit_projection,
    principal_components,
)

COLUMN = ActivationColumn("last", 12)


def activations(num_prompts: int, size: int, decay: float, seed: int = 0) -> NDArray[np.float16]:
    """Correlated activations, each dimension with its own scale and offset; `decay` 0 makes them isotropic."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    x = rng.normal(size=(num_prompts, size)) * np.arange(1, size + 1) ** -decay @ rotation
    return np.asarray(x * rng.uniform(0.5, 5.0, size) + rng.normal(size=size), np.float16)


def fitted(x: NDArray[Any]) -> Projection:
    return fit_projection(COLUMN, Moments.of(x))


@pytest.mark.parametrize(("num_prompts", "size", "decay"), [(300, 80, 0.3), (200, 90, 1.0), (120, 10, 0.5)])
def test_features_are_those_of_scikit_learn_up_to_sign(num_prompts: int, size: int, decay: float) -> None:
    x = activations(num_prompts, size, decay)
    wide = x.astype(np.float64)
    projection = fitted(x)
    pca = PCA(projection.num_features, svd_solver="full")
    expected = pca.fit_transform(StandardScaler().fit_transform(wide))
    features = projection(x)
    assert features.shape == (num_prompts, projection.num_features)
    signs = np.sign((features * expected).sum(0))
    np.testing.assert_allclose(features * signs, expected, atol=1e-3)


def test_other_rows_are_projected_like_those_it_was_fitted_on() -> None:
    x = activations(300, 60, 0.5)
    seen, unseen = x[:200].astype(np.float64), x[200:].astype(np.float64)
    projection = fitted(x[:200])
    scaler = StandardScaler().fit(seen)
    pca = PCA(projection.num_features, svd_solver="full").fit(scaler.transform(seen))
    expected = pca.transform(scaler.transform(unseen))
    np.testing.assert_allclose(np.abs(projection(x[200:])), np.abs(expected), atol=1e-3)


def test_as_many_components_as_explain_the_variance() -> None:
    x = activations(800, 120, 0.15)
    pca = PCA(EXPLAINED_VARIANCE, svd_solver="full").fit(StandardScaler().fit_transform(x.astype(np.float64)))
    assert MIN_FEATURES < pca.n_components_ < 120
    assert fitted(x).num_features == pca.n_components_


@pytest.mark.parametrize(
    ("num_prompts", "size", "decay", "expected"),
    [
        pytest.param(200, 80, 2.0, MIN_FEATURES, id="at least the minimum"),
        pytest.param(900, 400, 0.0, MAX_FEATURES, id="at most the maximum"),
        pytest.param(100, 20, 0.5, 20, id="no more than dimensions"),
        pytest.param(12, 80, 0.5, 11, id="no more than prompts less one"),
        pytest.param(1, 8, 0.5, 1, id="at least one"),
    ],
)
def test_number_of_features(num_prompts: int, size: int, decay: float, expected: int) -> None:
    assert fitted(activations(num_prompts, size, decay)).num_features == expected


def test_features_are_uncorrelated_and_centred() -> None:
    x = activations(300, 40, 0.5)
    features = fitted(x)(x).astype(np.float64)
    covariance = np.cov(features.T)
    np.testing.assert_allclose(features.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert (np.diff(np.diag(covariance)) <= 1e-6).all()


def test_components_are_orthonormal_float32() -> None:
    components = fitted(activations(100, 30, 0.5)).components
    assert components.dtype == np.float32
    np.testing.assert_allclose(components.T @ components, np.eye(30), atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.5, 0.1])
def test_a_dimension_that_never_varies_adds_no_variance(constant: float) -> None:
    x = activations(100, 6, 0.5).astype(np.float64)
    wider = np.column_stack([x, np.full(len(x), constant)])
    features = fit_projection(COLUMN, Moments.of(wider))(wider)
    assert features.shape == (100, 7)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features.var(0).sum(), 6.0, rtol=1e-4)


def test_prompts_that_are_all_alike_have_features_of_zero() -> None:
    x = np.full((5, 4), 0.5, np.float16)
    features = fitted(x)(x)
    assert features.shape[1] >= 1
    np.testing.assert_array_equal(features, np.zeros_like(features))


def test_projection_keeps_its_column() -> None:
    assert fitted(activations(10, 3, 0.5)).column == COLUMN


def test_fewer_features_where_asked() -> None:
    x = activations(300, 80, 0.3)
    few = fit_projection(COLUMN, Moments.of(x), max_features=7)
    np.testing.assert_array_equal(few.components, fitted(x).components[:, :7])


def test_whitened_features_have_unit_variance() -> None:
    x = activations(300, 40, 1.0).astype(np.float64)
    plain, whitened = fitted(x)(x), fit_projection(COLUMN, Moments.of(x), whiten=True)(x)
    np.testing.assert_allclose(whitened.var(0), 1.0, rtol=1e-3)
    np.testing.assert_allclose(whitened, plain / plain.std(0), atol=1e-3)


def test_whitening_does_not_magnify_what_hardly_varies() -> None:
    x = np.random.default_rng(0).normal(size=(500, 2))
    x = np.column_stack([x, x[:, 0] + 1e-6 * np.random.default_rng(1).normal(size=500)])
    components = fit_projection(COLUMN, Moments.of(x), whiten=True).components
    assert np.linalg.norm(components[:, 2]) == pytest.approx(WHITEN_FLOOR**-0.5, rel=1e-4)


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.5])
def test_subspace_iteration_finds_the_exact_components(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues agree to 1e-6 of the greatest, and the span of the components keeps all but 1e-4 of its variance."""
    covariance = Moments.of(activations(900, 300, decay).astype(np.float64)).covariance
    exact, _ = principal_components(covariance, 60)
    monkeypatch.setattr(projection_module, "EXACT_HIDDEN_SIZE", 100)
    values, vectors = principal_components(covariance, 60)
    np.testing.assert_allclose(vectors.T @ vectors, torch.eye(60), atol=1e-9)
    np.testing.assert_allclose(values, exact, atol=1e-6 * float(exact[0]))
    kept = float((vectors.T @ covariance @ vectors).trace())
    assert kept == pytest.approx(float(exact.sum()), rel=1e-4)


def test_a_projection_of_a_large_layer_is_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(900, 300, 0.6).astype(np.float64)
    exact = fitted(x)
    monkeypatch.setattr(projection_module, "EXACT_HIDDEN_SIZE", 100)
    approximate = fitted(x)
    assert approximate.num_features == exact.num_features
    np.testing.assert_allclose(np.abs(approximate(x))[:, :20], np.abs(exact(x))[:, :20], atol=1e-2)


def test_subspace_iteration_of_nothing_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_module, "EXACT_HIDDEN_SIZE", 2)
    x = np.full((5, 4), 0.5)
    np.testing.assert_array_equal(fitted(x)(x), 0.0)
