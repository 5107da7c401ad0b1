from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefill_router.probe.moments import NUM_FOLDS, LabelledMoments, Moments

Array = NDArray[np.float64]


@st.composite
def shards(draw: st.DrawFn) -> tuple[Array, list[NDArray[np.int64]]]:
    """Vectors (N, 3) and their row numbers, shuffled and cut into shards, some of them empty."""
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    x = rng.normal(size=(n, 3)) * 10.0 ** draw(st.integers(-3, 3)) + draw(st.floats(-100, 100))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
    return x, np.split(rng.permutation(n), cuts)


def outcomes(num_prompts: int, seed: int, missing: float = 0.3) -> Array:
    """Outcomes (N, 4): two targets of 0 or 1, graded on the same prompts, and two with partial credit on others."""
    rng = np.random.default_rng(seed)
    correct = rng.random((num_prompts, 4))
    correct[:, :2] = correct[:, :2].round()
    gone = rng.random((num_prompts, 4)) < missing
    gone[:, 1] = gone[:, 0]
    correct[gone] = np.nan
    return correct


def assert_same(a: Moments, b: Moments) -> None:
    scale = max(1.0, float(b.scatter.abs().max()), float(b.count * b.mean.abs().max() ** 2))
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=1e-9, atol=1e-12 * scale)


def assert_same_labelled(a: LabelledMoments, b: LabelledMoments) -> None:
    assert a.group_of == b.group_of
    for group, expected in zip(a.groups, b.groups, strict=True):
        assert_same(group, expected)
    np.testing.assert_allclose(a.counts_FCT, b.counts_FCT, atol=1e-9)
    np.testing.assert_allclose(a.squares_T, b.squares_T, atol=1e-9)
    np.testing.assert_allclose(
        a.sums_FCTD, b.sums_FCTD, rtol=1e-9, atol=1e-12 * max(1.0, float(b.sums_FCTD.abs().max()))
    )


def assert_describes(labelled: LabelledMoments, x: Array, correct: Array) -> None:
    """Checks that every target's moments are those of the prompts that it was graded on."""
    for t, y in enumerate(correct.T):
        graded = ~np.isnan(y)
        assert_same(labelled.target(t).graded, Moments.of(x[graded]))
        np.testing.assert_allclose(labelled.counts_FCT[:, :, t].sum(0), [(1 - y[graded]).sum(), y[graded].sum()])
    masks = [tuple(np.isnan(y)) for y in correct.T]
    assert labelled.group_of == tuple(list(dict.fromkeys(masks)).index(mask) for mask in masks)


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
@given(shards(), st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.3, 0.9]))
def test_labelled_moments_of_shards_in_any_order_merge_to_those_of_the_whole(
    case: tuple[Array, list[NDArray[np.int64]]], seed: int, missing: float
) -> None:
    x, parts = case
    correct = outcomes(len(x), seed, missing)
    keys = np.random.default_rng(seed).integers(0, 2**63, len(x)).astype(np.uint64)
    whole = LabelledMoments.of(x, correct, keys)
    assert_describes(whole, x, correct)
    by_shard = [LabelledMoments.of(x[rows], correct[rows], keys[rows]) for rows in parts]
    assert_same_labelled(reduce(LabelledMoments.merge, by_shard), whole)
    assert_same_labelled(reduce(LabelledMoments.merge, reversed(by_shard)), whole)


@settings(deadline=None)
@given(shards(), st.integers(0, 1000))
def test_labelled_merge_is_associative(case: tuple[Array, list[NDArray[np.int64]]], seed: int) -> None:
    x, _ = case
    correct = outcomes(len(x), seed)
    a, b, c = (LabelledMoments.of(x[i], correct[i]) for i in np.array_split(np.arange(len(x)), 3))
    assert_same_labelled(a.merge(b).merge(c), a.merge(b.merge(c)))


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.floats(-100, 100))
def test_rows_are_taken_out_again(seed: int, num_out: int, offset: float) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(60, 3)) + offset)
    left = Moments.of(x).without(x[:num_out])
    assert left is not None
    assert_same(left, Moments.of(x[num_out:]))


def test_rows_that_hold_nearly_all_of_a_scatter_are_not_taken_out_but_left_out() -> None:
    x = np.random.default_rng(5).normal(size=(60, 3))
    x[7, 1] = 1e9
    correct = np.ones((60, 2))
    correct[7, 1] = np.nan
    assert Moments.of(x).without(torch.from_numpy(x[7:8])) is None
    assert_same(LabelledMoments.of(x, correct).target(1).graded, Moments.of(np.delete(x, 7, 0)))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1])
def test_a_dimension_that_never_varies_is_taken_out_as_any_other(constant: float) -> None:
    x = np.random.default_rng(6).normal(size=(60, 3))
    x[:, 1] = constant
    left = Moments.of(x).without(torch.from_numpy(x[:4]))
    assert left is not None
    assert_same(left, Moments.of(x[4:]))


def test_targets_graded_on_the_same_prompts_share_one_scatter() -> None:
    x = np.random.default_rng(7).normal(size=(40, 3))
    correct = outcomes(40, seed=7)
    assert LabelledMoments.of(x, correct[:, [0, 2, 1]]).group_of == (0, 1, 0)
    first, second = LabelledMoments.of(x[:20], np.ones((20, 3))), LabelledMoments.of(x[20:], correct[20:, [0, 2, 1]])
    assert (first.group_of, first.merge(second).group_of) == ((0, 0, 0), (0, 1, 0))


def test_a_prompt_is_in_the_fold_of_its_key() -> None:
    x = np.random.default_rng(8).normal(size=(40, 3))
    keys = np.full(40, 2**63 + 5, np.uint64)
    keys[:10] = NUM_FOLDS
    labelled = LabelledMoments.of(x, np.ones((40, 1)), keys)
    np.testing.assert_array_equal(np.flatnonzero(labelled.counts_FCT.sum((1, 2))), [0, 5])
    np.testing.assert_allclose(labelled.sums_FCTD[5, 1, 0], x[10:].sum(0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_moments_are_those_of_numpy(dtype: type) -> None:
    x: NDArray[Any] = np.random.default_rng(0).normal(2.0, 3.0, (50, 4)).astype(dtype)
    moments = Moments.of(x)
    wide = x.astype(np.float64)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(wide.T, bias=True), rtol=1e-10, atol=1e-12)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64


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
    labelled = LabelledMoments.of(x, correct)
    for target in range(4):
        moments = labelled.target(target)
        graded = ~np.isnan(correct[:, target])
        y, rows = correct[graded, target], x[graded]
        p1 = y.mean()
        right, wrong = np.average(rows, 0, weights=y), np.average(rows, 0, weights=1 - y)
        within = p1 * np.cov(rows.T, aweights=y, ddof=0) + (1 - p1) * np.cov(rows.T, aweights=1 - y, ddof=0)
        assert moments.graded.count == graded.sum()
        assert moments.share_correct == pytest.approx(p1)
        assert moments.relative_variance == pytest.approx(y.var() / (p1 * (1 - p1)))
        np.testing.assert_allclose(moments.mean_difference, right - wrong, rtol=1e-10)
        np.testing.assert_allclose(moments.within_covariance, within, rtol=1e-9, atol=1e-12)


def test_a_target_that_was_never_graded_has_no_share() -> None:
    moments = LabelledMoments.of(np.ones((3, 2)), np.full((3, 1), np.nan)).target(0)
    assert moments.graded.count == 0.0
    assert np.isnan(moments.share_correct)
