"""An encoder's fingerprint changes with everything that changes its activations, and unknown layers are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefill_router.common.errors import UserError
from prefill_router.encoder import checkpoint
from prefill_router.encoder.encoder_spec import EncoderSize, EncoderSpec, check_encoder
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from tiny import CHAT_TEMPLATE, save_tiny_model

NUM_LAYERS, HIDDEN_SIZE, CONTEXT = 4, 32, 256


def load(folder: Path, **options: Any) -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec(**{"model": str(folder), "dtype": "float32", **options}), device="cpu")


@pytest.mark.parametrize(
    ("layers", "pooling", "message"),
    [
        ([5], ["last"], "layer 5 is out of range: .* has layers 0 to 4"),
        ([-1], ["last"], "layer -1 is out of range"),
        ([1], ["max"], 'pooling "max" is unknown: use last or mean'),
        ([], ["last"], "no layers or no poolings were given"),
        ([1], [], "no layers or no poolings were given"),
    ],
)
def test_a_layer_or_pooling_that_is_not_there_is_an_error(
    tiny_encoder: PrefillEncoder, layers: list[int], pooling: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_encoder.encode(["one"], layers, pooling)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_encoder_has_one_fingerprint(tiny_encoder: PrefillEncoder, tiny_model: Path, tmp_path: Path) -> None:
    assert load(tiny_model).fingerprint == tiny_encoder.fingerprint
    copy = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert load(copy).fingerprint == tiny_encoder.fingerprint


def test_the_device_is_not_in_the_fingerprint(tiny_encoder: PrefillEncoder, tiny_model: Path) -> None:
    spec = EncoderSpec(model=str(tiny_model), dtype="float32")
    assert PrefillEncoder.load(spec, device="meta").fingerprint == tiny_encoder.fingerprint


def test_the_context_limits_max_tokens_in_the_fingerprint_too(tiny_encoder: PrefillEncoder, tiny_model: Path) -> None:
    assert load(tiny_model, max_tokens=CONTEXT).fingerprint == tiny_encoder.fingerprint


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"max_tokens": 100}, {"mean_over": "after_first"}])
def test_an_option_that_changes_activations_changes_the_fingerprint(
    tiny_encoder: PrefillEncoder, tiny_model: Path, options: dict[str, Any]
) -> None:
    assert load(tiny_model, **options).fingerprint != tiny_encoder.fingerprint


@pytest.mark.parametrize("options", [{"seed": 1}, {"chat_template": CHAT_TEMPLATE + " "}, {"chat_template": None}])
def test_another_model_or_template_changes_the_fingerprint(
    tiny_encoder: PrefillEncoder, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert load(save_tiny_model(tmp_path / "same")).fingerprint == tiny_encoder.fingerprint
    assert load(save_tiny_model(tmp_path / "other", **options)).fingerprint != tiny_encoder.fingerprint


def test_another_tokenizer_changes_the_fingerprint(tiny_encoder: PrefillEncoder, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["one"], vocabulary["two"] = vocabulary["two"], vocabulary["one"]
    path.write_text(json.dumps(tokenizer))
    assert load(tmp_path).fingerprint != tiny_encoder.fingerprint


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}])
def test_another_configuration_of_the_same_weights_changes_the_fingerprint(
    tiny_encoder: PrefillEncoder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    edit_json(save_tiny_model(tmp_path) / "config.json", **changes)
    encoder = load(tmp_path)
    assert not np.array_equal(encoder.encode(["one"], [4])["last_004"], tiny_encoder.encode(["one"], [4])["last_004"])
    assert encoder.fingerprint != tiny_encoder.fingerprint


def test_an_identity_loads_the_same_encoder(tiny_encoder: PrefillEncoder) -> None:
    identity = tiny_encoder.identity
    assert (identity.num_layers, identity.hidden_size) == (NUM_LAYERS, HIDDEN_SIZE)
    assert PrefillEncoder.load(identity.spec, device="cpu").identity == identity


def test_the_check_and_the_size_agree_with_the_loaded_encoder(tiny_encoder: PrefillEncoder, tiny_model: Path) -> None:
    check_encoder(tiny_encoder.spec, [0, NUM_LAYERS])
    with pytest.raises(UserError, match=f"layer 5 is out of range: {tiny_model} has layers 0 to 4"):
        check_encoder(tiny_encoder.spec, [5])
    assert EncoderSize.of(str(tiny_model)) == EncoderSize(NUM_LAYERS, HIDDEN_SIZE, tiny_encoder.cost)


def test_the_size_of_a_gguf_can_be_the_first_to_unpack_it(
    tiny_encoder: PrefillEncoder, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(_gguf: Path, target: Path) -> None:
        assert torch.get_default_device().type == "cpu"  # transformers loads no weights under "meta"
        shutil.copytree(tiny_model, target)

    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "_unpack", unpack)
    (tmp_path / "model.gguf").touch()
    assert EncoderSize.of(str(tmp_path)) == EncoderSize(NUM_LAYERS, HIDDEN_SIZE, tiny_encoder.cost)
