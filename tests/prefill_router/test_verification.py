"""An encoder that is not read exactly is refused when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from prefill_router.backbone import find_blocks
from prefill_router.decoder import Visit
from prefill_router.encoder import EncoderSpec, PrefillEncoder
from prefill_router.hooked import HookedBackbone
from prefill_router.verification import check_causal, check_states
from reference import hidden_states, relative_error
from tiny import SIZES, save_tiny_model

CONTEXT, LAYERS, WIDTH = SIZES["max_position_embeddings"], SIZES["num_hidden_layers"], SIZES["hidden_size"]
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).get_decoder().eval()


def test_a_causal_model_that_is_read_as_it_is_passes(backbone: Any) -> None:
    check_causal(backbone, CONTEXT)
    check_states(backbone, HookedBackbone(backbone, find_blocks(backbone)).run, LAYERS, WIDTH, CONTEXT)


def test_a_mixture_of_experts_is_causal_though_it_rounds_otherwise(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, config=Qwen3MoeConfig(**SIZES, **MIXTURE))
    encoder = PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), device="cpu")
    prompts = ["one two three", "what is the sum of one two"]
    encoded, ids = encoder.encode(prompts), encoder.tokenize(prompts).ids
    for row, states in enumerate(hidden_states(folder, ids)):
        for layer in range(LAYERS + 1):
            assert relative_error(encoded[f"last_{layer:03d}"][row], states[layer, -1]) < 1e-3


def test_tokens_that_see_later_ones_are_noticed(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block alone, as of a model that mixes both kinds."""
    attention = find_blocks(backbone)[2].self_attn
    run = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attended, weights = run(*args, **kwargs)
        return attended + 0.1 * attended.mean(1, keepdim=True), weights

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(ValueError, match="it is no causal LM: its tokens see the ones after them"):
        check_causal(backbone, CONTEXT)


def misread(change: Any) -> Any:
    def wrap(backbone: Any) -> Any:
        hooked = HookedBackbone(backbone, find_blocks(backbone))
        return lambda pack, visit, deepest: hooked.run(pack, change(visit), deepest)

    return wrap


def shifted(visit: Visit) -> Visit:
    """Each block's states before it in place of those after it."""
    before: list[Tensor] = []

    def shift(layer: int, states: Tensor) -> None:
        before.append(states)
        visit(layer, before[max(0, layer - 1)])

    return shift


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (shifted, 1),
        (lambda visit: lambda layer, states: visit(layer, states * 1.01), 0),
        (lambda visit: lambda layer, states: visit(layer, states * (torch.nan if layer == 3 else 1.0)), 3),
        (lambda visit: lambda layer, states: visit(layer, states.roll(1, 0) if layer == 4 else states), 4),
    ],
)
def test_states_that_differ_name_the_layer(backbone: Any, change: Any, layer: int) -> None:
    with pytest.raises(ValueError, match=f"its layer {layer} is not read as transformers gives it"):
        check_states(backbone, misread(change)(backbone), LAYERS, WIDTH, CONTEXT)


def test_states_of_another_shape_are_refused(backbone: Any) -> None:
    run = HookedBackbone(backbone, find_blocks(backbone)).run
    with pytest.raises(ValueError, match=r"layer 0 have shape \(48, 32\), must be \(48, 64\)"):
        check_states(backbone, run, LAYERS, 64, CONTEXT)
    with pytest.raises(ValueError, match="it gives 5 hidden states for 3 blocks"):
        check_states(backbone, run, 3, WIDTH, CONTEXT)


def test_the_check_keeps_to_a_short_context(tmp_path: Path) -> None:
    from transformers import GPT2Config

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8, "vocab_size": SIZES["vocab_size"]}
    folder = save_tiny_model(tmp_path, config=GPT2Config(**sizes))
    encoder = PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), device="cpu")
    assert encoder.spec.max_tokens == 8
    assert np.isfinite(encoder.encode(["one two " * 20])["last_002"]).all()
