from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.encoder.prefill_encoder import EncoderSpec, PrefillEncoder
from prefill_router.policy.decision import Policy
from prefill_router.policy.pool import Pool, Target
from prefill_router.policy.selection import choose
from prefill_router.router.artifact import MANIFEST, Router
from tiny import random_prompts, save_tiny_model

PROMPTS = random_prompts(20, seed=9)
TARGETS = ["big", "small"]


def save(router: Router, folder: Path) -> Path:
    router.save(str(folder))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def weights_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def with_prices(router: Router, input_price: float) -> Router:
    targets = (Target(name="big", input_price=input_price, output_price=8.0), router.pool.targets[1])
    return replace(router, pool=Pool(name=router.pool.name, targets=targets))


def mlp(x: NDArray[Any], weights: list[NDArray[Any]], biases: list[NDArray[Any]]) -> NDArray[Any]:
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias
        x = np.maximum(x, 0.0) if layer < len(weights) - 1 else x
    return x


def ensemble(net: torch.nn.Module, x: NDArray[Any]) -> NDArray[Any]:
    """Outputs (K, N, T) of each seed's net, in numpy and float64."""
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
    """Standardise and project; mean log-odds of trunk and kernel machine; the median of a log-normal length."""
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
    """While another thread loads a model, transformers sets it for the whole process."""
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
    tokens = tiny_router.encoder.tokenize(PROMPTS)
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
    tokens = tiny_router.encoder.tokenize(PROMPTS[:3])
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
    with pytest.raises(UserError, match=r'target "huge" is not one of the router\'s: big, small'):
        tiny_router.with_pool(Pool(name="pool", targets=(huge,)))


# --- the artifact ------------------------------------------------------------------------------------------------


def test_a_saved_router_predicts_the_same(tiny_router: Router, root: str) -> None:
    tiny_router.save(root)
    loaded = Router.load(root)
    for a, b in zip(loaded.predict(PROMPTS), tiny_router.predict(PROMPTS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.version == tiny_router.version
    assert loaded.route(PROMPTS[0]) == tiny_router.route(PROMPTS[0])
    assert (loaded.pool, loaded.default_tolerance, loaded.training, loaded.columns) == (
        tiny_router.pool,
        tiny_router.default_tolerance,
        tiny_router.training,
        tiny_router.columns,
    )
    np.testing.assert_array_equal(loaded.training_prompts, tiny_router.training_prompts)


def test_the_artifact_is_json_and_safetensors_alone(tiny_router: Router, tmp_path: Path) -> None:
    save(tiny_router, tmp_path)
    weights = weights_file(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MANIFEST, weights.name])
    header = weights.read_bytes()
    assert isinstance(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]), dict)
    assert json.loads((tmp_path / MANIFEST).read_text())["version"] == tiny_router.version


def test_saving_again_writes_the_same_bytes(tiny_router: Router, tmp_path: Path) -> None:
    first, again = save(tiny_router, tmp_path / "a"), save(Router.load(str(tmp_path / "a")), tmp_path / "b")
    assert [p.read_bytes() for p in sorted(first.iterdir())] == [p.read_bytes() for p in sorted(again.iterdir())]


def test_another_router_replaces_the_one_that_lay_there(tiny_router: Router, root: str) -> None:
    tiny_router.save(root)
    other = replace(tiny_router, trunk=tiny_router.trunk.of_outputs([1, 0]))
    other.save(root)
    assert Router.load(root).version == other.version
    assert len(storage.list_files(root, [".safetensors"])) == 1


def test_the_old_router_stays_whole_until_the_new_one_is(
    tiny_router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny_router, tmp_path)

    def fail(_uri: str, _value: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        save(replace(tiny_router, trunk=tiny_router.trunk.of_outputs([1, 0])), tmp_path)
    assert Router.load(str(tmp_path)).version == tiny_router.version


def test_the_version_follows_the_content(tiny_router: Router) -> None:
    others = [
        with_prices(tiny_router, 2.5),
        replace(tiny_router, default_tolerance=0.1),
        replace(tiny_router, trunk=tiny_router.trunk.of_outputs([1, 0])),
        replace(tiny_router, training_prompts=np.array([3], np.uint64)),
        replace(tiny_router, encoder_identity=tiny_router.encoder_identity.model_copy(update={"fingerprint": "x"})),
    ]
    assert len({tiny_router.version, *(other.version for other in others)}) == 6
    assert with_prices(tiny_router, 2.0).version == tiny_router.version


def test_loading_a_router_does_not_load_its_encoder(
    tiny_router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: PrefillEncoder
) -> None:
    save(tiny_router, tmp_path)

    def fail(*_args: object, **_options: object) -> PrefillEncoder:
        raise AssertionError("the encoder was loaded")

    activations = tiny_encoder.encode(PROMPTS, [2, 3])
    monkeypatch.setattr(PrefillEncoder, "load", fail)
    assert Router.load(str(tmp_path)).predict_activations(activations).p_correct.shape == (len(PROMPTS), 2)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_missing_router_is_an_error(root: str) -> None:
    with pytest.raises(UserError, match=r"no router lies here \(router\.json is missing\): run train first"):
        Router.load(root)


def test_a_router_of_a_newer_format_is_an_error(tiny_router: Router, tmp_path: Path) -> None:
    edit(save(tiny_router, tmp_path), lambda content: content.update(format=2, novelty=True))
    with pytest.raises(UserError, match=r"router\.json: format 2 is newer than this release reads \(1\): upgrade"):
        Router.load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["pool"]["targets"][0].update(input_price=0.001),
            "does not match its content: the file was changed",
        ),
        (lambda c: c.update(default_tolerance=0.5), "does not match its content: the file was changed"),
        (lambda c: c["encoder"].update(fingerprint="x"), "does not match its content: the file was changed"),
        (lambda c: c.update(version="x"), "version x does not match its content"),
        (lambda c: c.update(weights_sha256="x"), r"its checksum is not the one in router\.json: the file is damaged"),
        (lambda c: c.update(weights="weights-0.safetensors"), "no such weights file, though router.json names it"),
        (lambda c: c["columns"].append("last_004"), r"does not fit router\.json"),
        (lambda c: c["columns"].reverse(), "does not match its content|does not fit"),
        (lambda c: c.pop("pool"), "pool is missing"),
        (lambda c: c.update(tolerance=1), 'unknown key "tolerance"'),
    ],
)
def test_an_edited_router_is_refused(
    tiny_router: Router, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(save(tiny_router, tmp_path), change)
    with pytest.raises(UserError, match=message):
        Router.load(str(tmp_path))


def rewritten(router: Router, folder: Path, weights: bytes) -> Path:
    """The artifact with other weights under their true checksum, as someone who means it would write it."""
    path = weights_file(save(router, folder))
    path.write_bytes(weights)
    edit(folder, lambda content: content.update(weights_sha256=hashlib.sha256(weights).hexdigest()))
    return folder


def changed_tensor(router: Router, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> bytes:
    tensors = router._tensors()
    return safetensors.numpy.save({**tensors, name: np.ascontiguousarray(change(tensors[name]))})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("projection.last_002.mean", "has shape"),
        ("projection.last_002.std", "has shape"),
        ("projection.last_002.components", "has shape"),
        ("trunk.weights.0", "size mismatch|has shape"),
        ("trunk.weights.1", "size mismatch|has shape"),
        ("kernel.landmarks", "has shape"),
        ("kernel.coefficients", "has shape"),
        ("kernel.mean", r"kernel\.mean has shape \(3,\), must be \(4,\)"),
        ("length_scale", r"length_scale has shape \(1,\), must be \(2,\)"),
        ("length_spread", r"length_spread has shape \(1,\), must be \(2,\)"),
        ("calibration.kinds", r"must be \(T,\), \(T, Q\), \(T, Q\)"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(tiny_router: Router, tmp_path: Path, name: str, message: str) -> None:
    folder = rewritten(tiny_router, tmp_path, changed_tensor(tiny_router, name, lambda values: values[:-1]))
    with pytest.raises(UserError, match=rf"(?s)does not fit router\.json: .*({message})"):
        Router.load(str(folder))


def test_parts_that_are_whole_but_of_another_pool_are_refused(tiny_router: Router, tmp_path: Path) -> None:
    trunk, kernel = tiny_router.trunk.of_outputs([0]), tiny_router.kernel.of_outputs([0, 2])
    for i, other in enumerate([replace(tiny_router, trunk=trunk), replace(tiny_router, kernel=kernel)]):
        with pytest.raises(UserError, match=r"does not fit router\.json: .* has shape"):
            Router.load(str(save(other, tmp_path / str(i))))


@pytest.mark.parametrize("name", ["trunk.weights.0", "kernel.coefficients", "projection.mean_003.std"])
def test_a_tensor_that_is_not_finite_is_refused(tiny_router: Router, tmp_path: Path, name: str) -> None:
    weights = changed_tensor(tiny_router, name, lambda values: np.full_like(values, np.nan))
    with pytest.raises(UserError, match=f"{name} is not finite"):
        Router.load(str(rewritten(tiny_router, tmp_path, weights)))


def test_a_pickle_is_never_read(tiny_router: Router, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "pwned"),))

    with pytest.raises(UserError, match=r"does not fit router\.json"):
        Router.load(str(rewritten(tiny_router, tmp_path / "a", pickle.dumps(Bomb()))))
    edit(save(tiny_router, tmp_path / "b"), lambda content: content.update(weights="../weights.pkl"))
    with pytest.raises(UserError, match=r"weights = '\.\./weights\.pkl'"):
        Router.load(str(tmp_path / "b"))
    assert not (tmp_path / "pwned").exists()


def test_weights_that_end_early_are_refused(tiny_router: Router, tmp_path: Path) -> None:
    whole = weights_file(save(tiny_router, tmp_path / "whole")).read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        with pytest.raises(UserError, match=r"does not fit router\.json"):
            Router.load(str(rewritten(tiny_router, tmp_path / str(size), whole[:size])))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_manifest_that_is_none_is_an_error(tiny_router: Router, tmp_path: Path, text: str) -> None:
    (save(tiny_router, tmp_path) / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"router\.json: "):
        Router.load(str(tmp_path))


@pytest.mark.parametrize("position", [0, 100, -1])
def test_damaged_weights_are_refused(tiny_router: Router, tmp_path: Path, position: int) -> None:
    path = weights_file(save(tiny_router, tmp_path))
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"\.safetensors: its checksum is not the one in router\.json: .* damaged"):
        Router.load(str(tmp_path))


def test_weights_that_are_gone_are_an_error(tiny_router: Router, tmp_path: Path) -> None:
    weights_file(save(tiny_router, tmp_path)).unlink()
    with pytest.raises(UserError, match=r"no such weights file, though router\.json names it"):
        Router.load(str(tmp_path))


def test_another_encoder_at_the_same_place_is_refused(tiny_router: Router, tiny_model: Path, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_model, tmp_path / "model")
    encoder = PrefillEncoder.load(EncoderSpec(model=str(place), dtype="float32"), device="cpu")
    save(replace(tiny_router, encoder_identity=encoder.identity), tmp_path / "router")
    router = Router.load(str(tmp_path / "router"))
    assert router.route(PROMPTS[0]).target in TARGETS

    save_tiny_model(place, seed=1)
    router = Router.load(str(tmp_path / "router"))
    with pytest.raises(UserError, match=rf"{place}: encoder fingerprint \w+ is not {encoder.fingerprint}, on which"):
        router.predict(PROMPTS)
    with pytest.raises(UserError, match="train again"):
        router.route(PROMPTS[0])
