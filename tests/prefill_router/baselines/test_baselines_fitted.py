"""Baselines: fitting, restoring, comparison with independent references, and serving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from prefill_router import storage
from prefill_router.baselines import (
    BASELINES,
    Always,
    Baseline,
    Clusters,
    EmbeddingNet,
    Logistic,
    MatrixFactorisation,
    Mixture,
    PromptLength,
    Random,
    any_router,
)
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.baselines.fitting import Prompts, fit_all
from prefill_router.common.errors import UserError
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from prefill_router.metrics import roc_auc, tolerance_curve
from prefill_router.policy.decision import Policy
from prefill_router.policy.pool import Pool, Target
from tiny import random_prompts

Array = NDArray[np.float64]
COST = (0.1, 0.3, 1.0)
POOL = Pool(
    name="three",
    targets=tuple(Target(name=n, input_price=p, output_price=p) for n, p in zip("abc", COST, strict=True)),
)


def data(num_prompts: int = 400, missing: float = 0.1, seed: int = 0) -> tuple[Array, Array]:
    """Features (N, 8), and outcomes (N, 3) that depend on the first two of them; some are missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_prompts, 8))
    logits = x[:, :2] @ np.array([[2.0, 1.5, 1.0], [0.0, 1.0, -1.5]]) + np.array([-0.5, 0.2, 1.0])
    correct = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    correct[rng.random(correct.shape) < missing] = np.nan
    return x, correct


def made(name: str) -> Baseline:
    return {"always": lambda: Always(1), "mixture": lambda: Mixture(COST)}.get(name, BASELINES[name])()


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_predicts_probabilities_and_is_restored_from_its_arrays(name: str) -> None:
    x, correct = data()
    x = np.abs(x[:, :1] * 100) if BASELINES[name].reads == "length" else x
    baseline = made(name).fit(x[:300], correct[:300])
    p = baseline.predict_proba(x[300:])
    assert p.shape == (100, 3)
    assert ((p >= 0.0) & (p <= 1.0)).all()
    assert all(isinstance(value, np.ndarray) for value in baseline.tensors().values())
    restored = BASELINES[name].restored(baseline.settings(), baseline.tensors())
    np.testing.assert_array_equal(restored.predict_proba(x[300:]), p)
    np.testing.assert_array_equal(made(name).fit(x[:300], correct[:300]).predict_proba(x[300:]), p)


@pytest.mark.parametrize("name", ["kmeans", "knn", "logistic", "factorisation", "mlp"])
def test_baselines_on_embeddings_learn_from_them(name: str) -> None:
    x, correct = data(1200)
    p = made(name).fit(x[:800], correct[:800]).predict_proba(x[800:])
    for t in range(3):
        graded = ~np.isnan(correct[800:, t])
        assert roc_auc(correct[800:, t][graded], p[graded, t]) > 0.65


# --- baselines that ignore the prompt ----------------------------------------------------------------------


def test_random_chooses_every_target_equally_often() -> None:
    x, correct = data(6000)
    p = Random().fit(x, correct).predict_proba(x)
    np.testing.assert_allclose(np.bincount(p.argmax(1)) / len(x), 1 / 3, atol=0.02)


def test_always_is_one_target() -> None:
    x, correct = data()
    assert (Always(2).fit(x, correct).predict_proba(x).argmax(1) == 2).all()


def test_a_mixture_runs_along_the_hull_of_the_targets() -> None:
    rng = np.random.default_rng(0)
    accuracies = np.array([0.4, 0.75, 0.8])  # the middle target is above the line between the others
    correct = (rng.random((40_000, 3)) < accuracies).astype(float)
    x = np.zeros((len(correct), 1))
    p = Mixture(COST).fit(x, correct).predict_proba(x)
    curve = tolerance_curve(correct, p, COST)
    hull = np.interp(curve[:, 1], COST, correct.mean(0))
    assert np.abs(curve[:, 2] - hull).max() < 0.01
    assert curve[0, 1] == pytest.approx(1.0)
    assert np.interp(0.5, curve[:, 0], curve[:, 1]) == pytest.approx(0.1, abs=1e-3)


def test_a_mixture_leaves_out_targets_below_the_hull() -> None:
    correct = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]], float)
    p = Mixture(COST).fit(correct, correct).predict_proba(np.zeros((500, 1)))
    assert (p[:, 1] == 0.0).all()
    assert (p[:, 2] == 1.0).all()


# --- baselines that read the prompt ----------------------------------------------------------------------


def test_logistic_matches_scikit_learn() -> None:
    x, correct = data(missing=0.0)
    p = Logistic(inverse_strength=0.5).fit(x[:300], correct[:300]).predict_proba(x[300:])
    scaler = StandardScaler().fit(x[:300])
    for t in range(3):
        model = LogisticRegression(C=0.5).fit(scaler.transform(x[:300]), correct[:300, t])
        np.testing.assert_allclose(p[:, t], model.predict_proba(scaler.transform(x[300:]))[:, 1], atol=1e-4)


def test_a_target_with_one_class_keeps_its_accuracy() -> None:
    x, correct = data()
    correct[:, 0], correct[:, 1] = 1.0, np.nan
    p = Logistic().fit(x, correct).predict_proba(x)
    np.testing.assert_allclose(p[:, 0], 0.999, atol=1e-9)
    np.testing.assert_allclose(p[:, 1], 0.001, atol=1e-9)


def test_clusters_predict_their_mean_with_five_votes_of_the_overall_accuracy() -> None:
    x, correct = data(300)
    baseline = Clusters(num_clusters=4).fit(x, correct)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    nearest = np.array([np.argmin([((row - c) ** 2).sum() for c in baseline.centres_]) for row in unit])
    prior = np.nanmean(correct, 0)
    p = baseline.predict_proba(x)
    for cluster in range(4):
        for t in range(3):
            votes = correct[nearest == cluster, t]
            votes = votes[~np.isnan(votes)]
            expected = (votes.sum() + 5 * prior[t]) / (len(votes) + 5)
            np.testing.assert_allclose(p[nearest == cluster, t], expected, atol=1e-6)


def test_factorisation_of_full_rank_is_as_good_as_logistic_regressions() -> None:
    x, correct = data(2000, missing=0.0)
    logistic = Logistic(inverse_strength=1e3).fit(x, correct).predict_proba(x)
    factored = MatrixFactorisation(rank=3, penalty=1e-7).fit(x, correct).predict_proba(x)
    np.testing.assert_allclose(factored, logistic, atol=0.02)


def test_prompt_length_predicts_outcomes_that_depend_on_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, (800, 1)).astype(float)
    correct = (rng.random((800, 2)) < np.where(lengths < 200, 0.9, 0.2)).astype(float)
    p = PromptLength().fit(lengths, correct).predict_proba(np.array([[20.0], [900.0]]))
    assert (p[0] > 0.7).all()
    assert (p[1] < 0.3).all()


def test_the_net_is_invariant_to_the_scale_of_features() -> None:
    x, correct = data(300)
    p = EmbeddingNet().fit(x, correct).predict_proba(x)
    scaled = EmbeddingNet().fit(x * 100.0 + 7.0, correct).predict_proba(x * 100.0 + 7.0)
    np.testing.assert_allclose(scaled, p, atol=1e-3)


# --- fitting all baselines, and serving one ----------------------------------------------------------------------


def prompts(num_prompts: int, seed: int, *, with_embedding: bool = True) -> Prompts:
    x, correct = data(num_prompts, seed=seed)
    lengths = np.random.default_rng(seed).integers(5, 50, num_prompts)
    tokens = np.where(np.isnan(correct), np.nan, np.array([10.0, 20.0, 40.0]))
    return Prompts(lengths, correct, tokens, lengths, x if with_embedding else None)


def test_all_baselines_are_fitted_with_a_tolerance_of_their_own() -> None:
    fitted = list(fit_all(POOL, prompts(300, 0), prompts(80, 1)))
    assert [f.title for f in fitted[:3]] == ["always a", "always b", "always c"]
    assert {f.name for f in fitted} == set(BASELINES)
    assert all(0.0 <= f.tolerance <= 1.0 for f in fitted)
    assert all(f.output_tokens.tolist() == pytest.approx([10, 20, 40]) for f in fitted)


def test_without_embeddings_only_baselines_that_need_none_are_fitted() -> None:
    parts = (prompts(300, seed, with_embedding=False) for seed in (0, 1))
    assert {f.name for f in fit_all(POOL, *parts)} == {"always", "random", "mixture", "length"}


@pytest.fixture
def served(tiny_sentence_encoder: Path) -> BaselineRouter:
    encoder = SentenceEncoder.load(str(tiny_sentence_encoder))
    correct = (np.random.default_rng(0).random((60, 3)) < 0.5).astype(float)
    return BaselineRouter(
        name="logistic",
        baseline=Logistic().fit(encoder.embed(random_prompts(60)), correct),
        pool=POOL,
        output_tokens=np.array([10, 20, 40], np.float32),
        default_tolerance=0.02,
        sentence_encoder=str(tiny_sentence_encoder),
        fingerprint=encoder.fingerprint,
    )


def test_a_served_baseline_decides_as_the_policy_does(served: BaselineRouter) -> None:
    prompts = random_prompts(6, seed=9)
    p = served.baseline.predict_proba(served.encoder.embed(prompts)).astype(np.float32)
    decided = served.decide(served.encoder.tokenize(prompts), [Policy(tolerance=1.0)] * 6)
    assert [d.target for d in decided] == ["a"] * 6
    np.testing.assert_allclose([list(d.p_correct.values()) for d in decided], p, atol=1e-6)
    assert served.route(prompts[0], Policy(allowed=["c"])).target == "c"
    with pytest.raises(UserError, match='"nobody" is not in the pool'):
        served.route(prompts[0], Policy(allowed=["nobody"]))


def test_a_baseline_is_saved_and_loaded_unchanged(served: BaselineRouter, root: str) -> None:
    served.save(root)
    loaded = any_router.load(root)
    assert isinstance(loaded, BaselineRouter)
    assert loaded.version == served.version
    texts = random_prompts(5)
    np.testing.assert_array_equal(loaded.predict(texts).p_correct, served.predict(texts).p_correct)
    assert {storage.name(p) for p in storage.list_files(root, [".json", ".safetensors"])} == {
        "baseline.json",
        served._manifest_and_weights[0].weights,
    }


def test_damaged_weights_and_another_encoder_are_refused(
    served: BaselineRouter, tmp_path: Path, tiny_model: Path
) -> None:
    served.save(str(tmp_path))
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"damaged: its checksum is not the one in baseline\.json"):
        BaselineRouter.load(str(tmp_path))
    with pytest.raises(UserError, match="the sentence encoder differs from the one that the baseline was fitted with"):
        _ = replace(served, fingerprint="another").encoder


def test_a_baseline_that_was_edited_is_refused(served: BaselineRouter, tmp_path: Path) -> None:
    served.save(str(tmp_path))
    manifest = tmp_path / "baseline.json"
    manifest.write_text(manifest.read_text().replace('"default_tolerance": 0.02', '"default_tolerance": 0.5'))
    with pytest.raises(UserError, match="does not match the content, so the file was changed"):
        BaselineRouter.load(str(tmp_path))


def test_a_baseline_of_an_unknown_kind_is_refused(served: BaselineRouter, tmp_path: Path) -> None:
    replace(served, name="astrology").save(str(tmp_path))
    with pytest.raises(UserError, match='baseline "astrology" is unknown: it must be one of always, random'):
        BaselineRouter.load(str(tmp_path))
