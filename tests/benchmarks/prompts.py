"""What the benchmarks read: a sample of a corpus, or random words, and a random model where no weights are at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from prefill_router.common.console import say
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint
from prefill_router.encoder.prefill_encoder import PrefillEncoder


def sampled(encoder: PrefillEncoder, corpus: Path, num_prompts: int) -> list[str]:
    """A random sample, without the prompts that the encoder would cut: the loops of transformers cut none."""
    table = pq.read_table(corpus, columns=["prompt"])["prompt"]
    prompts: list[str] = table.take(np.random.default_rng(0).permutation(len(table))[:num_prompts]).to_pylist()
    cut = encoder.tokenize(prompts).is_truncated
    if cut.any():
        say(f"{cut.sum()} of {len(prompts)} prompts left out: longer than {encoder.spec.max_tokens} tokens")
    return [prompt for prompt, is_cut in zip(prompts, cut, strict=True) if not is_cut]


def random(encoder: PrefillEncoder, num_prompts: int, mean_tokens: int) -> list[str]:
    """Ordinary words of log-normal number; the chat template's tokens count into the mean."""
    rng, words = np.random.default_rng(0), ordinary_words(encoder)
    template_tokens = int(encoder.tokenize([words[0]]).num_tokens[0]) - 1
    sigma = 0.5
    tokens = rng.lognormal(np.log(mean_tokens) - sigma**2 / 2, sigma, num_prompts)
    num_words = np.clip(tokens - template_tokens, 1, encoder.spec.max_tokens - template_tokens).astype(int)
    return [" ".join(rng.choice(words, size)) for size in num_words]


def with_system_text(encoder: PrefillEncoder, prompts: Sequence[str], num_tokens: int) -> list[Prompt]:
    text = " ".join(np.random.default_rng(1).choice(ordinary_words(encoder), num_tokens))
    return [[{"role": "system", "content": text}, {"role": "user", "content": prompt}] for prompt in prompts]


def ordinary_words(encoder: PrefillEncoder) -> list[str]:
    """Words that are one token each, behind a space."""
    found = (re.fullmatch("[Ġ▁]?([a-z]{3,10})", token) for token in encoder.tokenizer.get_vocab())
    return sorted({match[1] for match in found if match})


def save_random_qwen3(folder: Path, tokenizer: str, device: str) -> str:
    """A causal LM of Qwen3-0.6B's shape with random weights, and a tokenizer, as a transformers directory."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    _tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


def _tokenizer(source: str) -> Any:
    if Path(source).is_dir():
        return AutoTokenizer.from_pretrained(source)
    return checkpoint.load_causal_lm(source, None, torch.bfloat16).tokenizer
