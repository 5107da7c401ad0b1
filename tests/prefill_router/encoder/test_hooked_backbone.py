"""Models outside the usual forms are compared with transformers in float32, for each prompt alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.hooked_backbone import HookedBackbone
from prefill_router.encoder.pack import Pack
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from reference import assert_equals_transformers
from tiny import SIZES, WORDS, random_prompts, save_tiny_model

PROMPTS = [*random_prompts(6), " ".join(WORDS * 5), "one"]  # 4 to 103 tokens

CONFIGS = {
    "a window": MistralConfig(**SIZES, sliding_window=16),
    "a window in some layers": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "dynamic rope": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "other frequencies for long prompts": Phi3Config(
        **SIZES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
        },
    ),
    "gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    "norms behind": Olmo2Config(**SIZES, eos_token_id=None),
    "two ropes, scaled embeddings": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16, sliding_window_pattern=2),
}
KEEPS_STATES = RecurrentGemmaConfig(**SIZES, lru_width=32, attention_window_size=16, pad_token_id=0)  # in its modules


def load(folder: Path, config: Any) -> PrefillEncoder:
    spec = EncoderSpec(model=str(save_tiny_model(folder, config=config)), dtype="float32")
    encoder = PrefillEncoder.load(spec, device="cpu")
    assert isinstance(encoder.backbone, HookedBackbone)
    return encoder


@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_transformers(name: str, tmp_path: Path) -> None:
    encoder = load(tmp_path, CONFIGS[name])
    tokens = encoder.tokenize(PROMPTS)
    assert_equals_transformers(tmp_path, tokens.ids, encoder.encode(PROMPTS))


def test_the_mean_may_leave_out_the_first_token(tmp_path: Path) -> None:
    spec = EncoderSpec(
        model=str(save_tiny_model(tmp_path, config=CONFIGS["gelu"])), dtype="float32", mean_over="after_first"
    )
    encoder = PrefillEncoder.load(spec, device="cpu")
    encoded = encoder.encode(PROMPTS)
    assert_equals_transformers(tmp_path, encoder.tokenize(PROMPTS).ids, encoded, mean_from=1)


@pytest.mark.parametrize("name", ["gelu", "dynamic rope"])
def test_a_pass_removes_its_hooks(tmp_path: Path, name: str) -> None:
    """After a full pass, one that ended early, and one that failed."""
    encoder = load(tmp_path, CONFIGS[name])
    backbone = encoder.backbone
    assert isinstance(backbone, HookedBackbone)

    def fail(layer: int, states: torch.Tensor) -> None:
        raise RuntimeError("no room")

    def ignore(layer: int, states: torch.Tensor) -> None: ...

    def hooks() -> list[Any]:
        modules = backbone.backbone.modules()
        return [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]

    before = hooks()  # a PackedBackbone has permanent hooks, which do nothing outside its runs
    pack = Pack.of([[1, 2], [3]], torch.device("cpu"))
    for visit, deepest in ((ignore, 4), (ignore, 2)):
        backbone.run(pack, visit, deepest)
    with pytest.raises(RuntimeError, match="no room"):
        backbone.run(pack, fail, 4)
    assert hooks() == before


@pytest.mark.parametrize("config", [CONFIGS["dynamic rope"], KEEPS_STATES], ids=["hooks", "states in modules"])
def test_a_run_within_a_run_changes_neither(tmp_path: Path, config: Any) -> None:
    """Threads run at the same time: here, a second run begins and ends at one layer of the first."""
    encoder = load(tmp_path, config)
    assert encoder.runs_side_by_side
    packs = [Pack.of(prompts, torch.device("cpu")) for prompts in ([[7, 8, 9]], [[5] * 4, [6] * 4])]

    def states_of(run: int, within: int | None = None) -> list[list[torch.Tensor]]:
        seen: list[list[torch.Tensor]] = [[], []]

        def visit(layer: int, states: torch.Tensor) -> None:
            seen[run].append(states)
            if layer == 2 and within is not None:
                seen[within] = states_of(within)[within]

        with torch.inference_mode():
            encoder.backbone.run(packs[run], visit, 4)
        return seen

    alone, together = [states_of(0)[0], states_of(1)[1]], states_of(0, within=1)
    assert [[len(states) for states in run] for run in together] == [[3] * 5, [8] * 5]
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_padding_reaches_no_visitor(tmp_path: Path) -> None:
    encoder = load(tmp_path, CONFIGS["gelu"])
    prompts = [[7, 8, 9, 10, 11], [12], [13, 14, 15]]
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        encoder.backbone.run(Pack.of(prompts, torch.device("cpu")), lambda _layer, states: seen.append(states), 4)
    assert [states.shape for states in seen] == [(9, 32)] * 5
    embedding = torch.cat([torch.tensor(ids) for ids in prompts])
    assert isinstance(encoder.backbone, HookedBackbone)
    np.testing.assert_array_equal(seen[0], encoder.backbone.backbone.embed_tokens.weight[embedding])
