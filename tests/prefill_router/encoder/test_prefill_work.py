from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig, Qwen3Config

from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefill_work import ModelCost, Work
from tiny import SIZES, save_tiny_model

# The tiny Llama: D 32, 4 heads of 8, 2 of keys, MLP 64.
BLOCK_WEIGHTS = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
ATTENTION_WIDTH = 4 * 8


def prompt(num_tokens: int) -> str:
    """Returns a prompt of `num_tokens` tokens, including three of the template."""
    return " ".join(["one"] * (num_tokens - 3))


def work_of(encoder: PrefillEncoder, prompts: list[str], deepest: int = 4) -> Work:
    return encoder.forward(encoder.tokenize(prompts), encoder.columns([deepest], ["last"]))[1]


def test_work_can_be_added() -> None:
    one, other = Work(1, 10, 8, 2, 100.0, 3), Work(2, 5, 5, 3, 50.0, 0)
    assert one + other == Work(3, 15, 13, 5, 150.0, 3)
    assert one + Work() == one


def test_padding_waste_is_the_share_of_computed_tokens() -> None:
    assert Work(computed_tokens=30, padded_tokens=10).padding_waste == 0.25
    assert Work().padding_waste == 0


def test_flops_equal_a_hand_count() -> None:
    cost = ModelCost.of_block(BLOCK_WEIGHTS, ATTENTION_WIDTH)
    # Prompts of 3 and 2 tokens: queries see 1, 2, 3 and 1, 2 keys. Two FLOPs per weight, two products per pair.
    assert cost.flops([3, 2], 0, 1) == 2 * BLOCK_WEIGHTS * 5 + 2 * 2 * ATTENTION_WIDTH * (6 + 3)
    assert cost.flops([3, 2], 0, 4) == 4 * cost.flops([3, 2], 0, 1)
    # After 10 prefix tokens, each query sees 10 more.
    assert cost.flops([3, 2], 10, 1) == cost.flops([3, 2], 0, 1) + 2 * 2 * ATTENTION_WIDTH * 5 * 10


def test_a_prefix_and_its_continuation_cost_as_much_as_the_whole() -> None:
    cost = ModelCost.of_block(BLOCK_WEIGHTS, ATTENTION_WIDTH)
    assert cost.flops([10], 0, 3) + cost.flops([7], 10, 3) == cost.flops([17], 0, 3)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES, head_dim=24)])
def test_flops_equal_those_that_torch_counts(config: LlamaConfig | Qwen3Config, tmp_path: Path) -> None:
    """torch counts the full square of scores, including the half that causality masks."""
    save_tiny_model(tmp_path, config=config)
    encoder = PrefillEncoder.load(EncoderSpec(model=str(tmp_path), dtype="float32"), device="cpu")
    backbone = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    length, width = 50, config.num_attention_heads * config.head_dim
    with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
        backbone(input_ids=torch.ones(1, length, dtype=torch.int64))
    counts = counter.get_flop_counts()
    counted = sum(sum(counts[f"{type(backbone).__name__}.layers.{i}"].values()) for i in range(4))
    hidden_pairs = length * (length - 1) / 2
    assert work_of(encoder, [prompt(length)]).flops == counted - 4 * 2 * 2 * width * hidden_pairs


def test_the_work_of_an_encoding(tiny_encoder: PrefillEncoder) -> None:
    """Nothing is padded, and nothing beyond the deepest layer is computed."""
    lengths = [50, 20, 4]
    cost = ModelCost.of_block(BLOCK_WEIGHTS, ATTENTION_WIDTH)
    for deepest in (0, 1, 4):
        work = work_of(tiny_encoder, [prompt(n) for n in lengths], deepest)
        assert work == Work(prompts=3, tokens=74, computed_tokens=74, flops=cost.flops(lengths, 0, deepest))


def test_a_shared_prefix_is_computed_once(tiny_encoder: PrefillEncoder) -> None:
    """The prompts share 17 of 20 tokens."""
    prompts = [f"{' '.join(['one'] * 16)} {word}" for word in map(str, range(30))]
    work = work_of(tiny_encoder, prompts)
    cost = ModelCost.of_block(BLOCK_WEIGHTS, ATTENTION_WIDTH)
    assert (work.prompts, work.tokens, work.computed_tokens) == (30, 600, 17 + 30 * 3)
    assert work.flops == cost.flops([17], 0, 4) + cost.flops([3] * 30, 17, 4)
    assert work.padding_waste == 0


def test_padding_is_counted(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}  # not supported in packs
    config = LlamaConfig(**SIZES, rope_parameters=dynamic)
    spec = EncoderSpec(model=str(save_tiny_model(tmp_path, config=config)), dtype="float32")
    encoder = PrefillEncoder.load(spec, device="cpu")
    lengths = [50, 20, 4]
    work = work_of(encoder, [prompt(n) for n in lengths])
    assert (work.tokens, work.computed_tokens, work.padded_tokens) == (74, 74, 3 * 50 - 74)
    assert work.padding_waste == (150 - 74) / 150
    assert work.flops == ModelCost.of_block(BLOCK_WEIGHTS, ATTENTION_WIDTH).flops(lengths, 0, 4)


def test_no_prompts_take_no_work(tiny_encoder: PrefillEncoder) -> None:
    assert work_of(tiny_encoder, []) == Work()
