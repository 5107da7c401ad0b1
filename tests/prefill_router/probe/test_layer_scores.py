from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression

from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.probe.layer_scores import (
    SHRINKAGE,
    Fisher,
    LayerProbe,
    by_encoder,
    choose,
    choose_columns,
    coverage,
    effective_dimensionality,
    fisher,
    fisher_separability,
    joint_columns,
    probe_column,
)
from prefill_router.probe.moments import LabelledMoments

Array = NDArray[np.float64]

SEEDS = st.integers(0, 10_000)


def labelled(seed: int, num_prompts: int = 60, size: int = 4, shift: float = 1.0) -> tuple[Array, Array]:
    """Returns correlated activations (N, D) and outcomes (N,); correct prompts are shifted in every dimension."""
    rng = np.random.default_rng(seed)
    y = (np.arange(num_prompts) % 3 == 0).astype(float)
    x = rng.normal(size=(num_prompts, size)) @ rng.normal(size=(size, size)) + shift * y[:, None]
    return x, y


def plain_fisher(x: Array, y: Array, shrinkage: float) -> float:
    """The formula of platform/METHOD.md, with each prompt weighted into both classes by its outcome."""
    p1 = y.mean()
    p0 = 1.0 - p1
    delta = np.average(x, 0, weights=y) - np.average(x, 0, weights=1 - y)
    within = p1 * np.cov(x.T, aweights=y, ddof=0) + p0 * np.cov(x.T, aweights=1 - y, ddof=0)
    within = (1 - shrinkage) * within + shrinkage * np.diag(np.diag(within))
    between = p1 * p0 * np.outer(delta, delta)
    return float(np.trace(np.linalg.inv(within) @ between))


def fisher_of(x: Array, y: Array, shrinkage: float = SHRINKAGE) -> Fisher:
    return fisher(LabelledMoments.of(x, y[:, None]).target(0), shrinkage)


def layer(target: str, pooling: str, index: int, j: float, encoder: str = "an-encoder") -> LayerProbe:
    column = ActivationColumn.parse(f"{pooling}_{index:03d}")
    return LayerProbe(encoder, column, target, 1.0, j, j, j - 0.1, j + 0.1, 10, 0.5)


@pytest.mark.parametrize("size", [1, 8, 30])
def test_d_eff_of_a_sphere_is_its_dimension(size: int) -> None:
    x = np.random.default_rng(size).normal(size=(20_000, size))
    assert effective_dimensionality(x) == pytest.approx(size, rel=0.01)


@settings(deadline=None)
@given(SEEDS)
def test_d_eff_of_a_line_is_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.outer(rng.normal(size=20), rng.normal(size=6)) + rng.normal(size=6)
    assert effective_dimensionality(x) == pytest.approx(1.0)


def test_d_eff_of_a_point_is_zero() -> None:
    assert effective_dimensionality(np.full((5, 3), 0.5)) == 0.0


@settings(deadline=None)
@given(SEEDS, st.floats(0.01, 100))
def test_d_eff_is_that_of_the_eigenvalues_at_any_scale(seed: int, scale: float) -> None:
    x = np.random.default_rng(seed).normal(size=(30, 5)) * np.arange(1, 6)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert effective_dimensionality(x * scale) == pytest.approx(expected)
    assert 1.0 <= expected <= 5.0


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["right or wrong", "partial credit"])
def test_fisher_is_the_plain_formula(kind: str, shrinkage: float) -> None:
    x, y = labelled(0)
    if kind == "partial credit":
        y = np.random.default_rng(0).random(len(y))
    assert fisher_separability(x, y, shrinkage) == pytest.approx(plain_fisher(x, y, shrinkage), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_unshrunk_fisher_is_what_discriminant_analysis_and_regression_find(seed: int) -> None:
    x, y = labelled(seed)
    j = fisher_separability(x, y, shrinkage=0.0)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    share = y.mean()
    assert j == pytest.approx(share * (1 - share) * float(lda.coef_[0] @ (lda.means_[1] - lda.means_[0])), rel=1e-8)
    r2 = LinearRegression().fit(x, y).score(x, y)
    assert j == pytest.approx(r2 / (1 - r2), rel=1e-8)


@settings(deadline=None)
@given(SEEDS, st.lists(st.floats(0.01, 100) | st.floats(-100, -0.01), min_size=4, max_size=4), st.floats(-10, 10))
def test_fisher_ignores_the_scale_and_offset_of_each_dimension(seed: int, scale: list[float], offset: float) -> None:
    x, y = labelled(seed)
    assert fisher_separability(x * scale + offset, y) == pytest.approx(fisher_separability(x, y), rel=1e-6)


@settings(deadline=None)
@given(SEEDS)
def test_fisher_ignores_the_order_of_the_prompts(seed: int) -> None:
    x, y = labelled(seed)
    order = np.random.default_rng(seed).permutation(len(y))
    assert fisher_separability(x[order], y[order]) == pytest.approx(fisher_separability(x, y), rel=1e-9)


@settings(deadline=None)
@given(SEEDS)
def test_fisher_is_the_same_for_right_and_wrong_exchanged(seed: int) -> None:
    x, y = labelled(seed)
    assert fisher_separability(x, 1 - y) == pytest.approx(fisher_separability(x, y), rel=1e-9)


def test_fisher_leaves_missing_outcomes_out() -> None:
    x, y = labelled(1)
    gone = np.arange(len(y)) % 4 == 0
    assert fisher_separability(x, np.where(gone, np.nan, y)) == pytest.approx(fisher_separability(x[~gone], y[~gone]))


def test_half_credit_is_one_right_and_one_wrong_answer() -> None:
    x, _ = labelled(2)
    y = np.random.default_rng(2).choice([0.0, 0.5, 1.0], len(x))
    twice = np.concatenate([np.ceil(y), np.floor(y)])
    assert fisher_separability(x, y) == pytest.approx(fisher_separability(np.tile(x, (2, 1)), twice), rel=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.5, 0.1, 1000.1])
def test_a_dimension_that_never_varies_separates_nothing(constant: float) -> None:
    x, y = labelled(3, num_prompts=50)
    wider = np.column_stack([x, np.full(len(x), constant)])
    assert fisher_separability(wider, y) == pytest.approx(fisher_separability(x, y), rel=1e-9)


@pytest.mark.parametrize("partial_credit", [False, True])
def test_a_layer_that_never_varies_has_a_fisher_of_zero(partial_credit: bool) -> None:
    rng = np.random.default_rng(9)
    # Like the embedding of the last token, which the chat template makes the same for every prompt.
    x = np.tile(rng.normal(size=8).astype(np.float16), (300, 1))
    y = rng.random(300).astype(np.float32) ** 4
    assert fisher_separability(x, y if partial_credit else y.round()) == pytest.approx(0.0, abs=1e-12)


def test_fisher_of_one_class_is_nan() -> None:
    x, y = labelled(4)
    assert np.isnan(fisher_separability(x, np.ones_like(y)))
    assert np.isnan(fisher_separability(x, np.zeros_like(y)))
    assert np.isnan(fisher_separability(x, np.full_like(y, np.nan)))


def test_a_singular_scatter_asks_for_shrinkage() -> None:
    x, y = labelled(5, num_prompts=4, size=8)
    with pytest.raises(UserError, match="4 prompts in 8 dimensions is singular"):
        fisher_separability(x, y, shrinkage=0.0)
    assert np.isfinite(fisher_separability(x, y))


@pytest.mark.parametrize("shrinkage", [0.0, SHRINKAGE])
def test_noise_has_a_fisher_of_d_over_n_and_a_corrected_one_of_zero(shrinkage: float) -> None:
    n, d = 120, 12
    rng = np.random.default_rng(6)
    y = (np.arange(n) < 50).astype(float)
    found = [fisher_of(rng.normal(size=(n, d)), y, shrinkage) for _ in range(300)]
    raw, corrected = np.array([f.j for f in found]), np.array([f.corrected for f in found])
    assert raw.mean() == pytest.approx(d / n, rel=0.25)
    assert abs(corrected.mean()) < 4 * corrected.std() / len(found) ** 0.5


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_corrected_fisher_of_partial_credit_is_the_one_of_very_many_prompts(shift: float) -> None:
    """As judges grade: all between 0.5 and 1, so that the classes hardly differ and neither do their sampled means."""
    rng = np.random.default_rng(11)

    def drawn(n: int) -> Fisher:
        y = rng.uniform(0.5, 1.0, n)
        return fisher_of(rng.normal(size=(n, 12)) + shift * y[:, None], y)

    found = [drawn(120) for _ in range(300)]
    raw, corrected = np.array([f.j for f in found]), np.array([f.corrected for f in found])
    expected = drawn(100_000).j
    assert raw.mean() > expected + 5 * raw.std() / len(found) ** 0.5
    assert abs(corrected.mean() - expected) < 4 * corrected.std() / len(found) ** 0.5


@pytest.mark.parametrize("n", [60, 240])
def test_the_corrected_fisher_of_gaussian_classes_is_the_true_one_at_any_number_of_prompts(n: int) -> None:
    rng = np.random.default_rng(7)
    y = (np.arange(n) % 2 == 0).astype(float)
    shift = np.array([1.0, 0.5, 0.0, 0.0, 0.0])
    corrected = [fisher_of(rng.normal(size=(n, 5)) + y[:, None] * shift, y, 0.0).corrected for _ in range(300)]
    true_j = 0.25 * float(shift @ shift)
    assert abs(np.mean(corrected) - true_j) < 4 * np.std(corrected) / len(corrected) ** 0.5


@pytest.mark.parametrize(("n", "shift"), [(1000, 0.0), (1000, 0.15), (1000, 0.6), (500, 0.6)])
def test_the_interval_holds_the_true_fisher_as_often_as_it_says_or_oftener(n: int, shift: float) -> None:
    rng = np.random.default_rng(8)
    d, trials = 10, 200
    y = (np.arange(n) % 2 == 0).astype(float)
    true_j = 0.25 * d * shift**2
    found = [fisher_of(rng.normal(size=(n, d)) + shift * y[:, None], y, 0.0) for _ in range(trials)]
    held = np.mean([f.low <= true_j <= f.high for f in found])
    assert held > 0.90
    spread = np.std([f.corrected for f in found])
    assert np.mean([f.high - f.low for f in found]) < 2.2 * 2 * 1.96 * spread


def test_the_interval_is_the_same_every_time_and_nan_where_no_fold_is_like_another() -> None:
    x, y = labelled(9, num_prompts=200)
    first = fisher_of(x, y)
    assert first == fisher_of(x, y)
    assert first.low < first.corrected < first.high
    one_fold = fisher(LabelledMoments.of(x, y[:, None], np.zeros(200, np.uint64)).target(0))
    assert one_fold.low == pytest.approx(one_fold.corrected)


def test_probe_of_a_column_has_a_row_for_each_target() -> None:
    x, y = labelled(8)
    correct = np.column_stack([y, 1 - y, np.full_like(y, np.nan)])
    correct[:6, 1] = np.nan
    column = ActivationColumn("mean", 7)
    rows = probe_column("an-encoder", column, ["a", "b", "c"], LabelledMoments.of(x, correct))
    first, second, third = rows
    assert {row.encoder for row in rows} == {"an-encoder"}
    assert [row.target for row in rows] == ["a", "b", "c"]
    assert (first.column, first.num_prompts, second.num_prompts, third.num_prompts) == (column, 60, 54, 0)
    assert first.share_correct == pytest.approx(y.mean())
    assert first.d_eff == pytest.approx(effective_dimensionality(x))
    assert second.d_eff == pytest.approx(effective_dimensionality(x[6:]))
    assert first.fisher_j == pytest.approx(plain_fisher(x, y, SHRINKAGE))
    assert second.fisher_j == pytest.approx(plain_fisher(x[6:], 1 - y[6:], SHRINKAGE))
    assert first.fisher_j_corrected < first.fisher_j
    assert np.isnan([third.d_eff, third.fisher_j, third.fisher_j_corrected, third.share_correct]).all()


def test_each_target_takes_the_column_with_the_highest_corrected_fisher() -> None:
    probes = [
        layer("a", "last", 1, 0.1),
        layer("a", "mean", 2, 0.3),
        layer("a", "last", 3, 0.2),
        layer("b", "last", 1, float("nan")),
        layer("b", "mean", 2, -0.2),
        layer("b", "last", 3, -0.1),
    ]
    chosen = {"a": ActivationColumn("mean", 2), "b": ActivationColumn("last", 3)}
    assert choose_columns(probes) == choose_columns(reversed(probes)) == chosen


def test_the_shallower_layer_wins_a_tie() -> None:
    probes = [layer("a", "last", 9, 0.3), layer("a", "mean", 4, 0.3), layer("a", "last", 6, 0.3)]
    assert choose_columns(probes) == {"a": ActivationColumn("mean", 4)}


def test_a_target_that_no_layer_can_tell_is_an_error() -> None:
    probes = [layer("a", "last", 1, 0.1), layer("always-right", "last", 1, float("nan"))]
    with pytest.raises(UserError, match='target "always-right": its graded answers are all correct or all wrong'):
        choose_columns(probes)


def test_each_target_takes_its_column_from_the_encoder_that_tells_it_best() -> None:
    probes = [layer("a", "last", 1, 0.2, "one"), layer("b", "last", 1, 0.5, "one")]
    probes += [layer("a", "mean", 7, 0.3, "two"), layer("b", "mean", 7, 0.4, "two")]
    chosen = choose(probes)
    assert {target: row.encoder for target, row in chosen.items()} == {"a": "two", "b": "one"}
    assert chosen["a"].column == ActivationColumn("mean", 7)
    assert by_encoder(probes) == {"one": probes[:2], "two": probes[2:]}


def table(j: dict[str, list[float]], layers: list[int], pooling: str = "last") -> list[LayerProbe]:
    return [
        layer(target, pooling, i, value)
        for target, values in j.items()
        for i, value in zip(layers, values, strict=True)
    ]


def layers_of(columns: list[ActivationColumn]) -> list[int]:
    return [column.layer for column in columns]


def test_a_joint_set_serves_all_targets_and_not_one_best() -> None:
    probes = table({"a": [0.5, 0.1, 0.4], "b": [0.1, 0.5, 0.4], "c": [0.1, 0.5, 0.4]}, [3, 9, 12])
    assert layers_of(joint_columns(probes)) == [12]
    assert coverage(probes, joint_columns(probes)) == pytest.approx(0.8)
    assert coverage(probes, [p.column for p in probes]) == pytest.approx(1.0)


def test_a_joint_set_has_a_column_of_each_pooling() -> None:
    probes = table({"a": [0.1, 0.3]}, [3, 9]) + table({"a": [0.2, 0.1]}, [3, 9], "mean")
    assert joint_columns(probes) == [ActivationColumn("last", 9), ActivationColumn("mean", 3)]


def test_a_joint_set_takes_a_shallower_column_that_is_nearly_as_good() -> None:
    probes = table({"a": [0.300, 0.395, 0.400]}, [6, 12, 24])
    assert layers_of(joint_columns(probes)) == [12]
    assert layers_of(joint_columns(probes, depth_tolerance=0.0)) == [24]
    assert layers_of(joint_columns(probes, depth_tolerance=0.5)) == [6]


def test_a_joint_set_of_targets_that_no_column_tells() -> None:
    assert layers_of(joint_columns(table({"a": [-0.4, -0.3]}, [6, 12]))) == [6]
    with pytest.raises(UserError, match='target "a"'):
        joint_columns(table({"a": [float("nan")]}, [6]))


@given(st.lists(st.lists(st.floats(-1, 1), min_size=5, max_size=5), min_size=1, max_size=4))
def test_a_joint_set_covers_no_more_than_all(j: list[list[float]]) -> None:
    probes = table({str(t): values for t, values in enumerate(j)}, [0, 3, 6, 9, 12])
    columns = joint_columns(probes)
    assert len(columns) == 1
    assert 0.0 <= coverage(probes, columns) <= 1.0 + 1e-9
