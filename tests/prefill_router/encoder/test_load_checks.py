"""Weights that transformers would load only partly, or without their scales or adapters, are rejected by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefill_router.common.errors import UserError
from prefill_router.encoder.checkpoint import load_causal_lm
from prefill_router.encoder.prefill_encoder import PrefillEncoder

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = model / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def also(**extra: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    names = {name.replace("__", "."): torch.zeros(shape) for name, shape in extra.items()}
    return lambda tensors: {**tensors, **names}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def quantised(tensors: Tensors) -> Tensors:
    """Quantises a linear layer to eight bits with a separate scale, like modelopt."""
    weight = f"{DOWN}.weight"
    scale = {f"{DOWN}.weight_scale": torch.tensor(0.01)}
    return {**tensors, weight: (tensors[weight] * 100).to(torch.float8_e4m3fn), **scale}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{DOWN}.weight"), f"{DOWN}.weight is missing in the weights, but config.json requires it"),
        (prefixed("_orig_mod."), "is missing .*: the file names it _orig_mod.model.*: save the model without that"),
        (prefixed("text."), r"model.embed_tokens.weight \(the first of \d+\) is missing .*names it text.model.embed"),
        (
            also(model__layers__4__input_layernorm__weight=(32,)),
            "model.layers.4.* is in the weights, but not in the model of config.json",
        ),
        (
            also(model__layers__1__self_attn__q_proj__bias=(32,)),
            "q_proj.bias is in the weights, but not in the model of config.json",
        ),
        (also(model__layers__0__mlp__up_proj__lora_A__weight=(2, 32)), "lora_A.weight is part of an adapter: merge"),
        (quantised, f"{DOWN}.weight_scale is a scale of a quantisation that transformers does not apply"),
    ],
)
def test_weights_that_do_not_match_are_rejected(
    model: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    rewrite(model, change)
    with pytest.raises(UserError, match=message) as refused:
        load_causal_lm(str(model), None, torch.float32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        also(model__layers__0__self_attn__rotary_emb__inv_freq=(4,)),  # present in old checkpoints
        also(vision_tower__patch_embedding__weight=(4, 4)),
        without("lm_head.weight"),
    ],
)
def test_tensors_outside_the_backbone_may_be_present_or_missing(
    model: Path, tiny_encoder: PrefillEncoder, change: Callable[[Tensors], Tensors]
) -> None:
    rewrite(model, change)
    spec = tiny_encoder.spec.model_copy(update={"model": str(model)})
    assert PrefillEncoder.load(spec, device="cpu").fingerprint == tiny_encoder.fingerprint


def test_an_adapter_beside_the_weights_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(UserError, match=r"it contains an adapter \(adapter_config.json\): merge it"):
        load_causal_lm(str(model), None, torch.float32)


@pytest.mark.parametrize("method", ["modelopt", "from-next-year"])
def test_an_unknown_quantisation_is_refused(model: Path, method: str) -> None:
    configure(model, quantization_config={"quant_method": method, "quant_algo": "FP8"})
    with pytest.raises(UserError, match=f"it is quantised by {method}, whose scales transformers does not apply"):
        load_causal_lm(str(model), None, torch.float32)


def test_a_quantisation_missing_in_config_json_is_rejected(model: Path) -> None:
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(UserError, match="it is quantised by modelopt"):
        load_causal_lm(str(model), None, torch.float32)


def test_the_fingerprint_depends_on_the_loaded_tensors(model: Path, tiny_encoder: PrefillEncoder) -> None:
    spec = tiny_encoder.spec.model_copy(update={"model": str(model)})
    save_file(
        {"nobodys": torch.zeros(3)}, model / "consolidated.safetensors"
    )  # an additional file, which is never read
    assert PrefillEncoder.load(spec, device="cpu").fingerprint == tiny_encoder.fingerprint
    rewrite(model, lambda tensors: {**tensors, f"{DOWN}.weight": tensors[f"{DOWN}.weight"] + 1e-3})
    assert PrefillEncoder.load(spec, device="cpu").fingerprint != tiny_encoder.fingerprint


def test_a_models_code_is_neither_run_nor_offered_to_be_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at a terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked to run code"))
    ran = model / "ran"
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    configure(model, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoTokenizer": [None, "own.Tokenizer"]})
    with pytest.raises(UserError, match=re.escape(str(model))):
        PrefillEncoder.load(str(model), device="cpu")
    assert not ran.exists()
