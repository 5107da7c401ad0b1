"""Artifacts on disk: what is written, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
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
from prefill_router.common.schema import ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.policy.pool import Pool, Target
from prefill_router.predictor.kernel_ridge import KernelMachine
from prefill_router.predictor.stand_in import StandIn
from prefill_router.predictor.trunk import SharedTrunkNet
from prefill_router.probe.projection import Projection
from prefill_router.router.artifact import MANIFEST, Router
from tiny import random_prompts

PROMPTS = random_prompts(20, seed=9)


def save(router: Router, folder: Path) -> Path:
    router.save(str(folder))
    return folder


def ramp(*shape: int) -> NDArray[np.float32]:
    return np.linspace(-1.0, 1.0, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def router_of(encoders: dict[str, EncoderIdentity]) -> Router:
    """A router of fixed numbers that reads a column of each encoder."""
    num_features = 3 * len(encoders)
    weights = [ramp(1, num_features, 4), ramp(1, 4, 2)]
    trunk = {f"weights.{i}": torch.from_numpy(w) for i, w in enumerate(weights)}
    trunk |= {f"biases.{i}": torch.from_numpy(w[:, :1]) for i, w in enumerate(weights)}
    targets = {"big": (2.0, 8.0), "small": (0.1, 0.4)}
    return Router(
        encoders=encoders,
        pool=Pool(
            name="p",
            targets=tuple(Target(name=n, input_price=i, output_price=o) for n, (i, o) in targets.items()),
        ),
        projections=[
            Projection(ActivationColumn("last", 6, name), ramp(8), ramp(8) + 2.0, ramp(8, 3)) for name in encoders
        ],
        trunk=SharedTrunkNet.from_state(trunk),
        kernel=KernelMachine(ramp(5, num_features).astype(np.float16), 1.5, ramp(5, 4), ramp(4)),
        kernel_weight=0.25,
        length_spread=ramp(2),
        length_scale=ramp(2) + 2.0,
        default_tolerance=0.05,
        training_prompts=np.array([3, 5, 8], np.uint64),
        training={"recipe": "best"},
    )


def identity(model: str) -> EncoderIdentity:
    spec = EncoderSpec(model=model, dtype="float32")
    return EncoderIdentity(spec=spec, num_layers=12, hidden_size=8, fingerprint="0" * 32)


def test_a_router_with_one_encoder_is_written_as_the_previous_release_wrote_it(tmp_path: Path) -> None:
    """The version and the hash of router.json are those of that release for the same numbers."""
    save(router_of({"": identity("org/encoder")}), tmp_path)
    data = (tmp_path / MANIFEST).read_bytes()
    assert hashlib.sha256(data).hexdigest() == "6b5739717f19bb0f753f6b299a08f26d97d822a0fb45456d672f7d0f56cfb01f"
    loaded = Router.load(str(tmp_path))
    assert (loaded.version, loaded.format) == ("818e8cea3fb0bdac", 1)
    assert loaded.encoders == {"": identity("org/encoder")}


def test_a_router_with_several_encoders_is_of_format_2(tmp_path: Path) -> None:
    encoders = {"one": identity("org/one"), "two": identity("package:two")}
    router = router_of(encoders)
    content = json.loads((save(router, tmp_path) / MANIFEST).read_text())
    assert (content["format"], content["columns"]) == (2, ["one:last_006", "two:last_006"])
    assert list(content["encoders"]) == ["one", "two"]
    assert "encoder" not in content
    loaded = Router.load(str(tmp_path))
    assert (loaded.version, loaded.encoders, loaded.columns) == (router.version, encoders, router.columns)
    activations = {column.name: ramp(4, 8) for column in router.columns}
    for ours, theirs in zip(
        loaded.predict_activations(activations), router.predict_activations(activations), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    without = loaded.features(activations, missing={"one"})
    features, landmarks = loaded.features(activations), loaded.kernel.landmarks
    np.testing.assert_array_equal(without[:, 3:], features[:, 3:])
    stand_in = StandIn.fit(landmarks[:, 3:], landmarks[:, :3])
    np.testing.assert_array_equal(without[:, :3], stand_in(features[:, 3:]))


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
        replace(tiny_router, encoders={"": tiny_router.encoders[""].model_copy(update={"fingerprint": "x"})}),
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
    with pytest.raises(UserError, match=r"no router found \(router\.json is missing\): run train first"):
        Router.load(root)


def test_a_router_of_a_newer_format_is_an_error(tiny_router: Router, tmp_path: Path) -> None:
    edit(save(tiny_router, tmp_path), lambda content: content.update(format=3, novelty=True))
    with pytest.raises(UserError, match=r"router\.json: format 3 is newer than this release reads \(2\): upgrade"):
        Router.load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["pool"]["targets"][0].update(input_price=0.001),
            "does not match the content, so the file was changed",
        ),
        (lambda c: c.update(default_tolerance=0.5), "does not match the content, so the file was changed"),
        (lambda c: c["encoder"].update(fingerprint="x"), "does not match the content, so the file was changed"),
        (lambda c: c.update(version="x"), "version x does not match the content"),
        (lambda c: c.update(weights_sha256="x"), r"damaged: its checksum is not the one in router\.json"),
        (lambda c: c.update(weights="weights-0.safetensors"), "no such weights file, though router.json names it"),
        (lambda c: c["columns"].append("last_004"), r"does not match router\.json"),
        (lambda c: c["columns"].reverse(), "does not match the content|does not match router"),
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
    """Saves the artifact with other weights and their correct checksum, as a deliberate change would."""
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
    with pytest.raises(UserError, match=rf"(?s)does not match router\.json: .*({message})"):
        Router.load(str(folder))


def test_parts_that_are_whole_but_of_another_pool_are_refused(tiny_router: Router, tmp_path: Path) -> None:
    trunk, kernel = tiny_router.trunk.of_outputs([0]), tiny_router.kernel.of_outputs([0, 2])
    for i, other in enumerate([replace(tiny_router, trunk=trunk), replace(tiny_router, kernel=kernel)]):
        with pytest.raises(UserError, match=r"does not match router\.json: .* has shape"):
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

    with pytest.raises(UserError, match=r"does not match router\.json"):
        Router.load(str(rewritten(tiny_router, tmp_path / "a", pickle.dumps(Bomb()))))
    edit(save(tiny_router, tmp_path / "b"), lambda content: content.update(weights="../weights.pkl"))
    with pytest.raises(UserError, match=r"weights = '\.\./weights\.pkl'"):
        Router.load(str(tmp_path / "b"))
    assert not (tmp_path / "pwned").exists()


def test_weights_that_end_early_are_refused(tiny_router: Router, tmp_path: Path) -> None:
    whole = weights_file(save(tiny_router, tmp_path / "whole")).read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        with pytest.raises(UserError, match=r"does not match router\.json"):
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
    with pytest.raises(UserError, match=r"\.safetensors: damaged: its checksum is not the one in router\.json"):
        Router.load(str(tmp_path))


def test_weights_that_are_gone_are_an_error(tiny_router: Router, tmp_path: Path) -> None:
    weights_file(save(tiny_router, tmp_path)).unlink()
    with pytest.raises(UserError, match=r"no such weights file, though router\.json names it"):
        Router.load(str(tmp_path))
