from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.policy.decision import Policy
from prefill_router.policy.pool import Pool, Target
from prefill_router.policy.selection import choose
from prefill_router.router.artifact import Router
from tiny import random_prompts, save_tiny_model

PROMPTS = random_prompts(20, seed=9)
TARGETS = ["big", "small"]


def save(router: Router, folder: Path) -> Path:
    router.save(str(folder))
    return folder


def mlp(x: NDArray[Any], weights: list[NDArray[Any]], biases: list[NDArray[Any]]) -> NDArray[Any]:
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias
        x = np.maximum(x, 0.0) if layer < len(weights) - 1 else x
    return x


def ensemble(net: torch.nn.Module, x: NDArray[Any]) -> NDArray[Any]:
    """Returns the outputs (K, N, T) of each seed's net, computed by numpy in float64."""
    state = {name: value.numpy().astype(np.float64) for name, value in net.state_dict().items()}
    layers = range(len(state) // 2)
    return np.stack(
        [
            mlp(x, [state[f"weights.{i}"][k] for i in layers], [state[f"biases.{i}"][k] for i in layers])
            for k in range(len(state["weights.0"]))
        ]
    )


# --- prediction --------------------------------------------------------------------------------------------------


def test_a_prediction_is_the_formula(tiny_router: Router, tiny_encoder: PrefillEncoder) -> None:
    """Checks projection, weighted mean log-odds of trunk and kernel machine, and lengths against plain numpy."""
    encoded = tiny_encoder.encode(PROMPTS, [2, 3])
    features = np.concatenate(
        [
            (encoded[p.column.name].astype(np.float64) - p.mean) / p.std @ p.components.astype(np.float64)
            for p in tiny_router.projections
        ],
        axis=1,
    )
    p_trunk = (1.0 / (1.0 + np.exp(-ensemble(tiny_router.trunk, features)))).mean(0)
    kernel = tiny_router.kernel
    distances = np.linalg.norm(features[:, None] - kernel.landmarks.astype(np.float64), axis=2)
    p_kernel, logs = np.split(
        np.exp(-np.sqrt(distances / kernel.lengthscale)) @ kernel.coefficients + kernel.mean, 2, axis=1
    )
    p_kernel = np.clip(p_kernel, 0.01, 0.99)
    log_odds = 0.75 * np.log(p_trunk / (1 - p_trunk)) + 0.25 * np.log(p_kernel / (1 - p_kernel))
    predicted = tiny_router.predict(PROMPTS)
    np.testing.assert_allclose(predicted.p_correct, 1 / (1 + np.exp(-log_odds)), rtol=1e-3)
    means = np.maximum(np.exp(logs) * np.array([1.25, 1.0]) - 1.0, 1.0)
    np.testing.assert_allclose(predicted.expected_output_tokens, means, rtol=1e-3)
    for values in predicted:
        assert values.shape == (len(PROMPTS), 2)
        assert values.dtype == np.float32
    upper = tiny_router.predict_length(PROMPTS, 0.9)
    np.testing.assert_allclose(upper, np.maximum(np.exp(logs + 1.2815516 * np.array([0.5, 0.3])) - 1.0, 1.0), rtol=1e-3)


def test_prompts_and_their_stored_activations_give_the_same(tiny_router: Router, tiny_encoder: PrefillEncoder) -> None:
    from_prompts = tiny_router.predict(PROMPTS)
    from_activations = tiny_router.predict_activations(tiny_encoder.encode(PROMPTS))
    for a, b in zip(from_prompts, from_activations, strict=True):
        np.testing.assert_array_equal(a, b)


def test_predictions_do_not_hang_on_torchs_default_type(tiny_router: Router, tiny_encoder: PrefillEncoder) -> None:
    """transformers sets it for the whole process while another thread loads a model."""
    expected = tiny_router.predict_activations(tiny_encoder.encode(PROMPTS))
    torch.set_default_dtype(torch.bfloat16)
    try:
        meanwhile = tiny_router.predict_activations(tiny_encoder.encode(PROMPTS))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(meanwhile, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_prompts_give_no_predictions(tiny_router: Router) -> None:
    assert tiny_router.predict([]).p_correct.shape == (0, 2)


# --- decisions ---------------------------------------------------------------------------------------------------


def test_a_decision_says_what_it_rests_on(tiny_router: Router) -> None:
    predicted = tiny_router.predict(PROMPTS[:1])
    decision = tiny_router.route(PROMPTS[0])
    p, tokens = (dict(zip(TARGETS, values[0].tolist(), strict=True)) for values in predicted)
    assert decision.p_correct == pytest.approx(p)
    assert decision.expected_output_tokens == pytest.approx(tokens)
    assert decision.input_tokens == len(PROMPTS[0].split()) + 3
    assert not decision.is_truncated
    assert decision.router_version == tiny_router.version
    cost = {
        t.name: (decision.input_tokens * t.input_price + tokens[t.name] * t.output_price) / 1e6
        for t in tiny_router.pool.targets
    }
    assert decision.expected_cost_usd == pytest.approx(cost)


def test_a_cut_prompt_says_so_and_costs_all_of_its_tokens(tiny_router: Router) -> None:
    decision = tiny_router.route("one " * 1000)
    tokens = decision.expected_output_tokens["big"]
    assert decision.input_tokens == 1003
    assert decision.is_truncated
    assert decision.expected_cost_usd["big"] == pytest.approx((1003 * 2.0 + tokens * 8.0) / 1e6)


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1, 1.0])
def test_decisions_follow_the_published_rule(tiny_router: Router, tolerance: float) -> None:
    tokens = tiny_router.tokenize(PROMPTS)
    decisions = tiny_router.decide(tokens, [Policy(tolerance=tolerance)] * len(PROMPTS))
    p, cost = ([list(getattr(d, name).values()) for d in decisions] for name in ("p_correct", "expected_cost_usd"))
    assert [d.target for d in decisions] == [TARGETS[t] for t in choose(p, cost, tolerance)]


def test_the_routers_own_tolerance_is_the_default(tiny_router: Router) -> None:
    strict, lax = (replace(tiny_router, default_tolerance=tolerance) for tolerance in (0.0, 1.0))
    assert {lax.route(prompt).target for prompt in PROMPTS[:3]} == {"small"}
    for prompt in PROMPTS[:3]:
        assert lax.route(prompt, tolerance=0.0).target == strict.route(prompt).target
    chosen = strict.route(PROMPTS[0])
    assert chosen.target == max(chosen.p_correct, key=lambda name: chosen.p_correct[name])


def test_only_allowed_targets_are_chosen(tiny_router: Router) -> None:
    for name in TARGETS:
        assert tiny_router.route(PROMPTS[0], allowed=[name]).target == name
    with pytest.raises(UserError, match='target "huge" is not in the pool: big, small'):
        tiny_router.route(PROMPTS[0], allowed=["big", "huge"])


def test_a_limit_of_cost_or_probability_is_kept(tiny_router: Router) -> None:
    free = tiny_router.route(PROMPTS[0], tolerance=1.0)
    assert free.target == "small"
    between = (free.expected_cost_usd["small"] + free.expected_cost_usd["big"]) / 2
    assert tiny_router.route(PROMPTS[0], tolerance=0.0, max_cost=between).target == "small"
    better = max(free.p_correct, key=lambda name: free.p_correct[name])
    min_p = sum(free.p_correct.values()) / 2
    assert tiny_router.route(PROMPTS[0], tolerance=1.0, min_p=min_p).target == better


@pytest.mark.parametrize("constraint", [{"max_cost": 0.0}, {"min_p": 1.0}, {"allowed": []}])
def test_there_is_no_target_where_none_meets_the_constraints(tiny_router: Router, constraint: dict[str, Any]) -> None:
    decision = tiny_router.route(PROMPTS[0], **constraint)
    assert decision.target is None
    assert list(decision.p_correct) == TARGETS


def test_each_prompt_has_its_own_policy(tiny_router: Router) -> None:
    tokens = tiny_router.tokenize(PROMPTS[:3])
    decisions = tiny_router.decide(tokens, [Policy(allowed=["big"]), Policy(min_p=1.0), Policy(allowed=["small"])])
    assert [d.target for d in decisions] == ["big", None, "small"]


# --- another pool ------------------------------------------------------------------------------------------------


def test_another_pool_takes_some_targets_as_they_are(tiny_router: Router) -> None:
    small = tiny_router.pool.targets[1].model_copy(update={"output_price": 100.0})
    other = tiny_router.with_pool(Pool(name="one", targets=(small,)))
    for a, b in zip(other.predict(PROMPTS), tiny_router.predict(PROMPTS), strict=True):
        np.testing.assert_allclose(a[:, 0], b[:, 1], rtol=1e-6)
    decision = other.route(PROMPTS[0])
    tokens = decision.expected_output_tokens["small"]
    assert decision.expected_cost_usd["small"] == pytest.approx((decision.input_tokens * 0.1 + tokens * 100.0) / 1e6)
    assert other.version != tiny_router.version


def test_another_order_changes_no_probability(tiny_router: Router) -> None:
    turned = tiny_router.with_pool(Pool(name="turned", targets=tiny_router.pool.targets[::-1]))
    for a, b in zip(turned.predict(PROMPTS), tiny_router.predict(PROMPTS), strict=True):
        np.testing.assert_allclose(a[:, ::-1], b, rtol=1e-6)


def test_a_target_that_the_router_does_not_know_is_refused(tiny_router: Router) -> None:
    huge = Target(name="huge", input_price=1.0, output_price=1.0)
    with pytest.raises(UserError, match=r'target "huge" is unknown to the router: use only big, small'):
        tiny_router.with_pool(Pool(name="pool", targets=(huge,)))


# --- its encoder -------------------------------------------------------------------------------------------------


def test_another_encoder_at_the_same_place_is_refused(tiny_router: Router, tiny_model: Path, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_model, tmp_path / "model")
    encoder = PrefillEncoder.load(EncoderSpec(model=str(place), dtype="float32"), device="cpu")
    save(replace(tiny_router, encoders={"": encoder.identity}), tmp_path / "router")
    router = Router.load(str(tmp_path / "router"))
    assert router.route(PROMPTS[0]).target in TARGETS

    save_tiny_model(place, seed=1)
    router = Router.load(str(tmp_path / "router"))
    with pytest.raises(UserError, match=rf"{place}: encoder fingerprint \w+ is not {encoder.fingerprint}, which"):
        router.predict(PROMPTS)
    with pytest.raises(UserError, match="train again"):
        router.route(PROMPTS[0])
