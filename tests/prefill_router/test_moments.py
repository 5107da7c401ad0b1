from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.moments import ClassMoments, Moments, class_moments

Array = NDArray[np.float64]


@st.composite
def shards(draw: st.DrawFn) -> tuple[Array, list[NDArray[np.int64]]]:
    """Vectors (N, 3) and their rows, shuffled and cut into shards, some of them empty."""
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    x = rng.normal(size=(n, 3)) * 10.0 ** draw(st.integers(-3, 3)) + draw(st.floats(-100, 100))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
    return x, np.split(rng.permutation(n), cuts)


def outcomes(num_prompts: int, seed: int, missing: float = 0.3) -> Array:
    """(N, 4): two targets right or wrong on the same prompts, two with partial credit on others."""
    rng = np.random.default_rng(seed)
    correct = rng.random((num_prompts, 4))
    correct[:, :2] = correct[:, :2].round()
    gone = rng.random((num_prompts, 4)) < missing
    gone[:, 1] = gone[:, 0]
    correct[gone] = np.nan
    return correct


def assert_same(a: Moments, b: Moments) -> None:
    scale = max(1.0, float(np.abs(b.scatter).max()), float(b.count * np.abs(b.mean).max() ** 2))
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=1e-9, atol=1e-12 * scale)


def assert_same_classes(a: ClassMoments, b: ClassMoments) -> None:
    assert_same(a.graded, b.graded)
    assert a.num_correct == pytest.approx(b.num_correct, abs=1e-9)
    if b.num_correct:
        np.testing.assert_allclose(a.mean_correct, b.mean_correct, rtol=1e-8, atol=1e-8)


@settings(deadline=None)
@given(shards())
def test_shards_in_any_order_merge_to_the_moments_of_the_whole(case: tuple[Array, list[NDArray[np.int64]]]) -> None:
    x, parts = case
    whole = Moments.of(x)
    assert_same(reduce(Moments.merge, [Moments.of(x[rows]) for rows in parts]), whole)
    assert_same(reduce(Moments.merge, [Moments.of(x[rows]) for rows in reversed(parts)]), whole)


@settings(deadline=None)
@given(shards())
def test_merge_is_associative(case: tuple[Array, list[NDArray[np.int64]]]) -> None:
    x, _ = case
    a, b, c = (Moments.of(part) for part in np.array_split(x, 3))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@settings(deadline=None)
@given(shards(), st.integers(0, 1000))
def test_class_moments_of_shards_merge_to_those_of_the_whole(
    case: tuple[Array, list[NDArray[np.int64]]], seed: int
) -> None:
    x, parts = case
    correct = outcomes(len(x), seed)
    by_shard = [class_moments(x[rows], correct[rows]) for rows in parts]
    for shares, whole in zip(zip(*by_shard, strict=True), class_moments(x, correct), strict=True):
        assert_same_classes(reduce(ClassMoments.merge, shares), whole)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_moments_are_those_of_numpy(dtype: type) -> None:
    x: NDArray[Any] = np.random.default_rng(0).normal(2.0, 3.0, (50, 4)).astype(dtype)
    moments = Moments.of(x)
    wide = x.astype(np.float64)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(wide.T, bias=True), rtol=1e-10, atol=1e-12)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64


def test_a_large_offset_costs_no_precision() -> None:
    x = np.random.default_rng(1).normal(size=(60, 3))
    far = x + 1e6
    merged = Moments.of(far[:20]).merge(Moments.of(far[20:]))
    np.testing.assert_allclose(merged.covariance, np.cov(x.T, bias=True), atol=1e-8)


def test_no_rows_have_moments_too() -> None:
    x = np.random.default_rng(2).normal(size=(5, 3))
    none = Moments.of(np.empty((0, 3)))
    assert (none.count, none.mean.shape, none.scatter.shape) == (0.0, (3,), (3, 3))
    for merged in (none.merge(Moments.of(x)), Moments.of(x).merge(none)):
        assert_same(merged, Moments.of(x))
    assert none.merge(none).count == 0.0


@pytest.mark.parametrize("view", ["reversed", "read-only"])
def test_any_view_of_an_array_will_do(view: str) -> None:
    x = np.random.default_rng(3).normal(size=(6, 3))
    expected = Moments.of(x.copy())
    x.setflags(write=view != "read-only")
    assert_same(Moments.of(x[::-1] if view == "reversed" else x), expected)


def test_class_moments_are_those_of_numpy_weighted_by_the_outcome() -> None:
    rng = np.random.default_rng(4)
    x, correct = rng.normal(size=(80, 3)), outcomes(80, seed=4)
    x += np.nan_to_num(correct[:, :1])
    for target, moments in enumerate(class_moments(x, correct)):
        graded = ~np.isnan(correct[:, target])
        y, rows = correct[graded, target], x[graded]
        p1 = y.mean()
        right, wrong = np.average(rows, 0, weights=y), np.average(rows, 0, weights=1 - y)
        within = p1 * np.cov(rows.T, aweights=y, ddof=0) + (1 - p1) * np.cov(rows.T, aweights=1 - y, ddof=0)
        assert moments.graded.count == graded.sum()
        assert moments.share_correct == pytest.approx(p1)
        np.testing.assert_allclose(moments.mean_difference, right - wrong, rtol=1e-10)
        np.testing.assert_allclose(moments.within_covariance, within, rtol=1e-9, atol=1e-12)


def test_a_target_that_was_never_graded_has_no_share() -> None:
    moments = class_moments(np.ones((3, 2)), np.full((3, 1), np.nan))[0]
    assert moments.graded.count == 0.0
    assert np.isnan(moments.share_correct)
