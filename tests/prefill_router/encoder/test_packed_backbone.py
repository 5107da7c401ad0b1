"""Model families without code of their own run over packs, and equal transformers for each prompt alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    Phi3Config,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from prefill_router.encoder import fused_modules, packed_backbone
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.packed_backbone import PackedBackbone
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from reference import hidden_states, relative_error
from tiny import SIZES, WORDS, save_tiny_model

LAYERS = SIZES["num_hidden_layers"]
WINDOW = 12  # shorter than most prompts
MIXED = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG = {"type": "longrope", "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
PACKED = {
    "the usual form": Qwen3Config(**SIZES, head_dim=8),
    "learned positions": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=256, vocab_size=SIZES["vocab_size"]),
    "windows and capped scores": Gemma2Config(**SIZES, head_dim=8, layer_types=MIXED, sliding_window=WINDOW),
    "windows and norms": Gemma3TextConfig(**SIZES, head_dim=8, layer_types=MIXED, sliding_window=WINDOW),
    "windows and parallel blocks": Cohere2Config(**SIZES, layer_types=MIXED, sliding_window=WINDOW),
    "sinks": GptOssConfig(
        **SIZES, head_dim=8, layer_types=MIXED, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "a mixture of experts": Qwen3MoeConfig(**SIZES, head_dim=8, **EXPERTS),
    "latent attention": DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **LATENT, **ROUTED),
}
DELTA_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA_SIZES = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 32}
NOT_PACKED = {
    "chunks": Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=64, num_local_experts=2),
    "convolutions": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2),
    "a mixture of experts and a recurrence": Qwen3_5MoeTextConfig(
        **SIZES, head_dim=8, **EXPERTS, **DELTA_HEADS, **DELTA_SIZES
    ),
    "a recurrence": MambaConfig(vocab_size=SIZES["vocab_size"], hidden_size=32, num_hidden_layers=4, state_size=8),
    "positions by the longest": Phi3Config(**SIZES, pad_token_id=0, rope_parameters={**LONG, "rope_theta": 1e4}),
}


def load(folder: Path, config: Any, dtype: str = "float32") -> PrefillEncoder:
    return PrefillEncoder.load(
        EncoderSpec(model=str(save_tiny_model(folder, config=config)), dtype=dtype), device="cpu"
    )


def prompts(num: int, shared_words: int = 0) -> list[str]:
    rng = np.random.default_rng(0)
    start = [*rng.choice(WORDS, shared_words)]
    return [" ".join([*start, *rng.choice(WORDS, rng.integers(1, 40))]) for _ in range(num)]


def assert_exact(encoder: PrefillEncoder, texts: list[str]) -> None:
    encoded, ids = encoder.encode(texts), encoder.tokenize(texts).ids
    for row, states in enumerate(hidden_states(Path(encoder.name), ids)):
        for layer in range(LAYERS + 1):
            assert relative_error(encoded[f"last_{layer:03d}"][row], states[layer, -1]) < 1e-3
            assert relative_error(encoded[f"mean_{layer:03d}"][row], states[layer].mean(0)) < 1e-3


@pytest.mark.parametrize("name", PACKED)
def test_a_pack_is_exact(tmp_path: Path, name: str) -> None:
    encoder = load(tmp_path, PACKED[name])
    assert isinstance(encoder.backbone, PackedBackbone)
    assert_exact(encoder, prompts(12))


@pytest.mark.parametrize("name", PACKED)
def test_a_shared_prefix_is_computed_once_and_exact(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, texts = load(tmp_path, PACKED[name]), prompts(12, shared_words=60)
    monkeypatch.setattr("prefill_router.encoder.prefill_encoder.BUDGET_TOKENS", {"cpu": 256})
    _, work = encoder.forward(encoder.tokenize(texts), encoder.columns("all", ["last"]))
    assert work.computed_tokens < work.tokens - 10 * 50
    assert work.padded_tokens == 0
    assert_exact(encoder, texts)


@pytest.mark.parametrize("name", ["a mixture of experts", "sinks", "a mixture of experts and a recurrence"])
def test_a_mixture_takes_two_grouped_products_a_layer(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers chooses at load between grouped products and a loop over experts."""
    encoder, num_products, product = load(tmp_path, (PACKED | NOT_PACKED)[name]), 0, torch.nn.functional.grouped_mm

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal num_products
        num_products += 1
        return product(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    encoder.encode(prompts(4))
    assert num_products == 2 * LAYERS


@pytest.mark.parametrize(
    "name",
    ["the usual form", "windows and capped scores", "windows and norms", "learned positions", "a mixture of experts"],
)
def test_the_bits_do_not_depend_on_the_pack(tmp_path: Path, name: str) -> None:
    encoder, texts = load(tmp_path, PACKED[name], "bfloat16"), prompts(8)
    together = encoder.encode(texts)
    for row, text in enumerate(texts):
        alone = encoder.encode([text])
        assert all(np.array_equal(alone[column][0], together[column][row]) for column in together)


def test_threads_may_share_it(tmp_path: Path) -> None:
    encoder, texts = load(tmp_path, PACKED["windows and norms"]), prompts(64)
    assert encoder.runs_side_by_side
    columns, tokens = encoder.columns("all", ["last"]), encoder.tokenize(texts)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        side_by_side, _ = encoder.forward(tokens, columns)
    finally:
        torch.set_num_threads(1)
    in_turn, _ = encoder.forward(tokens, columns)
    torch.set_num_threads(threads)
    assert all(np.allclose(side_by_side[name], in_turn[name], 1e-3, 1e-3) for name in in_turn)


@pytest.mark.parametrize("name", NOT_PACKED)
def test_models_whose_tokens_interact_outside_attention_are_padded_and_exact(tmp_path: Path, name: str) -> None:
    encoder = load(tmp_path, NOT_PACKED[name])
    assert not isinstance(encoder.backbone, PackedBackbone)
    assert_exact(encoder, prompts(6))
    shallow, whole = encoder.encode(prompts(6), layers=[1]), encoder.encode(prompts(6))
    assert all(np.array_equal(shallow[name], whole[name]) for name in shallow)


@pytest.mark.parametrize("name", ["mask", "position_bias"])
def test_a_model_specific_bias_is_not_ignored(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is too small to show in a comparison of two prompts in bfloat16."""

    def biased(*arguments: Any, **options: Any) -> Any:
        layer, query, key, value, mask = arguments
        bias = torch.full((1, 1, query.shape[2], query.shape[2]), 1e-4)
        mask, options = (bias, options) if name == "mask" else (mask, {**options, name: bias})
        return attend(layer, query, key, value, mask, **options)

    attend = packed_backbone._attend
    monkeypatch.setattr(packed_backbone, "_attend", biased)
    encoder = load(tmp_path, PACKED["learned positions"], "bfloat16")
    assert not isinstance(encoder.backbone, PackedBackbone)


def test_a_window_that_is_not_passed_to_attention_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of two short prompts cannot show it."""
    config = Gemma3TextConfig(**SIZES, head_dim=8, layer_types=MIXED, sliding_window=WINDOW)
    run = PackedBackbone.run

    def untold(self: PackedBackbone, *arguments: Any, **options: Any) -> None:
        run(self, *arguments, **options)
        self.windows = {None}

    monkeypatch.setattr(PackedBackbone, "run", untold)
    encoder = load(tmp_path, config)
    assert not isinstance(encoder.backbone, PackedBackbone)
    assert_exact(encoder, prompts(4))


def test_fused_modules_that_make_a_difference_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms multiply by one plus the weight; unchecked, they become norms that multiply by the weight."""
    monkeypatch.setattr(fused_modules, "_equals", lambda *_: True)
    encoder = load(tmp_path, PACKED["windows and norms"])
    assert isinstance(encoder.backbone, PackedBackbone)
    assert type(encoder.backbone.blocks[0].get_submodule("input_layernorm")).__name__ == "Gemma3RMSNorm"
    assert_exact(encoder, prompts(4))
