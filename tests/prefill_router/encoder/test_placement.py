"""A model that is larger than a GPU is divided over several, and its activations do not change by a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Lfm2Config, LlamaConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from fake_gpus import FakeGpus, fake_gpu
from prefill_router.common.errors import UserError
from prefill_router.common.schema import POOLINGS
from prefill_router.encoder import placement
from prefill_router.encoder import prefill_encoder as encoder_module
from prefill_router.encoder.checkpoint import load_causal_lm
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.fused_modules import fuse
from prefill_router.encoder.hooked_backbone import HookedBackbone
from prefill_router.encoder.packed_backbone import PackedBackbone
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from tiny import SIZES, WORDS, random_prompts, save_tiny_model

MIXED = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[type, Any]] = {
    "fused modules": (PackedBackbone, LlamaConfig(**SIZES)),
    "windows": (PackedBackbone, Gemma2Config(**SIZES, head_dim=8, layer_types=MIXED, sliding_window=12)),
    "experts": (PackedBackbone, Qwen3MoeConfig(**SIZES, head_dim=8, **EXPERTS)),
    "convolutions": (HookedBackbone, Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2)),
}
SHARING = [" ".join([*WORDS * 3, *prompt.split()]) for prompt in random_prompts(6)]  # have a common prefix
ACTIVATION_BYTES = 10_000  # 6 % of the tiny model's weights

Load = Callable[..., PrefillEncoder]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads an encoder on fake GPUs, each with room for activations and a share of the weights."""

    def load(folder: Path, num_gpus: int, share: float = 1.0) -> PrefillEncoder:
        weights = placement.num_bytes(load_causal_lm(str(folder), None, torch.float32).backbone)
        free = ACTIVATION_BYTES + int(share * weights)
        monkeypatch.setattr(placement, "gpus_of", lambda _device: [fake_gpu(i) for i in range(num_gpus)])
        monkeypatch.setattr(placement, "free_bytes", lambda _gpu: free)
        return PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), str(fake_gpu(0)))

    monkeypatch.setattr(placement, "activation_bytes", lambda _block, _tokens: ACTIVATION_BYTES)
    with FakeGpus(monkeypatch):
        yield load


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_divided_model_have_the_same_bits(
    tmp_path: Path, load: Load, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config = FAMILIES[family]
    folder = save_tiny_model(tmp_path, config=config)
    whole, divided = load(folder, 1), load(folder, 2, 0.8)
    assert (len(whole.devices), len(divided.devices)) == (1, 2)
    assert type(whole.backbone) is type(divided.backbone) is kind
    monkeypatch.setitem(encoder_module.BUDGET_TOKENS, "cpu", 256)
    for prompts in (random_prompts(5), SHARING):
        tokens, columns = whole.tokenize(prompts), whole.columns("all", POOLINGS)
        (expected, _), (encoded, work) = whole.forward(tokens, columns), divided.forward(tokens, columns)
        assert (work.computed_tokens < work.tokens) == (kind is PackedBackbone and prompts is SHARING)
        assert all(np.array_equal(encoded[name], expected[name]) for name in expected)
        shallow = divided.encode(prompts, layers=[0, 2])
        assert all(np.array_equal(shallow[name], expected[name]) for name in shallow)


@pytest.mark.parametrize(("num_gpus", "share", "num_used"), [(2, 1.0, 1), (2, 0.97, 2), (1, 0.97, 1)])
def test_a_gpu_of_several_keeps_room_for_activations(
    tiny_model: Path, load: Load, num_gpus: int, share: float, num_used: int
) -> None:
    """A single GPU holds whatever fits, for its packs may be small."""
    assert load(tiny_model, num_gpus, share).devices == [fake_gpu(i) for i in range(num_used)]


def test_the_gpus_have_equal_shares_of_the_blocks(tmp_path: Path, load: Load) -> None:
    sizes = SIZES | {"num_hidden_layers": 12, "vocab_size": 160}
    encoder = load(save_tiny_model(tmp_path, config=LlamaConfig(**sizes)), 3, 0.6)
    of_blocks = [block.input_layernorm.weight.device for block in encoder.backbone.blocks]
    assert of_blocks == sorted(of_blocks, key=str)
    assert all(3 <= of_blocks.count(fake_gpu(i)) <= 5 for i in range(3))


@pytest.mark.usefixtures("load")
def test_what_is_outside_the_blocks_is_on_the_first_gpu(tiny_model: Path) -> None:
    """BlenderbotSmall declares a norm after its blocks and uses it before them."""
    model = load_causal_lm(str(tiny_model), None, torch.float32).backbone
    room = int(0.8 * placement.num_bytes(model))
    placement.divide(model, model.layers, {fake_gpu(0): room, fake_gpu(1): room})
    weights = (model.embed_tokens.weight, model.norm.weight, model.layers[-1].mlp.up_proj.weight)
    assert [weight.device.index for weight in weights] == [0, 0, 1]


@pytest.mark.parametrize(("num_gpus", "share"), [(1, 0.9), (2, 0.4)])
def test_a_model_larger_than_all_gpus_is_an_error(tiny_model: Path, load: Load, num_gpus: int, share: float) -> None:
    with pytest.raises(UserError, match=r"its 0\.0 GB of weights do not fit into the 0\.0 GB .*: use more GPUs"):
        load(tiny_model, num_gpus, share)


def test_a_model_that_mixes_devices_is_an_error(tiny_model: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[torch.Tensor] = []

    def forward(_layer: Any, x: torch.Tensor) -> torch.Tensor:
        first.append(x)
        return x + first[0][:, :1]

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(UserError, match=r"it cannot be divided over 2 GPUs \(aten\.add.*\): use a GPU that has room"):
        load(tiny_model, 2, 0.8)


def test_a_gpu_holds_the_weights_of_fused_modules_once(tiny_model: Path, load: Load) -> None:
    model = load_causal_lm(str(tiny_model), None, torch.float32).backbone.to(fake_gpu(0))
    block = model.layers[0]
    originals = [block.self_attn.q_proj, block.mlp.down_proj]
    fuse(model.layers)
    for ours, theirs in zip([block.self_attn.q_proj.shared.product, block.mlp.down], originals, strict=True):
        assert ours.weight.values.data_ptr() == theirs.weight.values.data_ptr()


def test_room_for_activations_grows_with_the_pack_and_the_widest_matrix() -> None:
    block = torch.nn.ModuleList([torch.nn.Linear(8, 20, dtype=torch.bfloat16), torch.nn.Linear(20, 8)])
    assert placement.activation_bytes(block, 100) == 100 * placement._LIVE_WIDTHS * 20 * 4
    assert placement.activation_bytes(block, 300) == 3 * placement.activation_bytes(block, 100)
