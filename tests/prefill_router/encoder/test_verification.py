"""A model that cannot be run exactly is rejected on load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DogeConfig, Qwen3MoeConfig

from prefill_router.encoder.architecture import find_blocks
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.hooked_backbone import HookedBackbone
from prefill_router.encoder.pack import Pack, Visit
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.verification import Run, check_causal, expected_states
from reference import hidden_states, relative_error
from tiny import SIZES, save_tiny_model

CONTEXT, LAYERS, WIDTH = SIZES["max_position_embeddings"], SIZES["num_hidden_layers"], SIZES["hidden_size"]
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).get_decoder().eval()


def hooked(backbone: Any) -> Run:
    return HookedBackbone(backbone, find_blocks(backbone)).run


def test_a_causal_model_passes(backbone: Any) -> None:
    check_causal(backbone, CONTEXT)
    expected, run = expected_states(backbone, LAYERS, WIDTH, CONTEXT), hooked(backbone)
    expected.check(run)
    assert expected.matches_in_batch(run)


def test_a_mixture_of_experts_is_causal_despite_its_rounding(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, config=Qwen3MoeConfig(**SIZES, **MIXTURE))
    encoder = PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), device="cpu")
    prompts = ["one two three", "what is the sum of one two"]
    encoded, ids = encoder.encode(prompts), encoder.tokenize(prompts).ids
    for row, states in enumerate(hidden_states(folder, ids)):
        for layer in range(LAYERS + 1):
            assert relative_error(encoded[f"last_{layer:03d}"][row], states[layer, -1]) < 1e-3


def test_prompts_are_not_padded_if_attention_selects_keys(tmp_path: Path) -> None:
    """It could select keys of padding in prompts with more tokens than it selects keys."""
    folder = save_tiny_model(tmp_path, config=DogeConfig(**SIZES, keep_window_size=8))
    encoder = PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), device="cpu")
    prompts = ["one two three", "what is the sum of one two " * 3, "two two three", "a river"]
    together, alone = encoder.encode(prompts), [encoder.encode([prompt]) for prompt in prompts]
    for row, values in enumerate(alone):
        assert relative_error(together[f"mean_{LAYERS:03d}"][row], values[f"mean_{LAYERS:03d}"][0]) < 1e-3


def test_attention_to_later_tokens_is_detected(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block only, as in a model that mixes both kinds."""
    attention = find_blocks(backbone)[2].self_attn
    run = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attended, weights = run(*args, **kwargs)
        return attended + 0.1 * attended.mean(1, keepdim=True), weights

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(ValueError, match="it is not a causal LM: its tokens attend to later tokens"):
        check_causal(backbone, CONTEXT)


def shifted(visit: Visit) -> Visit:
    """Reports each block's input in place of its output."""
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
    with pytest.raises(ValueError, match=f"its layer {layer} differs from transformers'"):
        expected_states(backbone, LAYERS, WIDTH, CONTEXT).check(
            lambda pack, visit, deepest: hooked(backbone)(pack, change(visit), deepest)
        )


def test_an_effect_of_padding_is_detected_in_a_batch_only(backbone: Any) -> None:
    def run(pack: Pack, visit: Visit, deepest: int) -> None:
        change = 1.1 if len(pack.lengths) > 1 else 1.0
        hooked(backbone)(pack, lambda layer, states: visit(layer, states * change), deepest)

    expected = expected_states(backbone, LAYERS, WIDTH, CONTEXT)
    expected.check(run)
    assert not expected.matches_in_batch(run)


def test_states_of_another_shape_are_refused(backbone: Any) -> None:
    with pytest.raises(ValueError, match=r"layer 0 have shape \(24, 32\), must be \(24, 64\)"):
        expected_states(backbone, LAYERS, 64, CONTEXT)
    with pytest.raises(ValueError, match="it gives 5 hidden states for 3 blocks"):
        expected_states(backbone, 3, WIDTH, CONTEXT)
    with pytest.raises(ValueError, match=r"layer 0 has shape \(12, 32\), must be \(24, 32\)"):
        expected_states(backbone, LAYERS, WIDTH, CONTEXT).check(
            lambda pack, visit, deepest: hooked(backbone)(pack, lambda n, states: visit(n, states[::2]), deepest)
        )


def test_the_check_fits_in_a_short_context(tmp_path: Path) -> None:
    from transformers import GPT2Config

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8, "vocab_size": SIZES["vocab_size"]}
    folder = save_tiny_model(tmp_path, config=GPT2Config(**sizes))
    encoder = PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), device="cpu")
    assert encoder.spec.max_tokens == 8
    assert np.isfinite(encoder.encode(["one two " * 20])["last_002"]).all()
