"""Tiny test data: a random causal LM of four blocks, prompts from its vocabulary, and a pool of two targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "what is the sum of one two three four five six plus minus name a river in that big old town".split()  # noqa: SIM905
POOL_TOML = """
[[pool]]
name = "big"
input_price = 2.0
output_price = 8.0

[[pool]]
name = "small"
input_price = 0.1
output_price = 0.4
"""
SPECIAL = ["<unk>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *map(str, range(100))])}
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def save_word_tokenizer(folder: Path, chat_template: str | None) -> None:
    """Saves a tokenizer of whole words from VOCABULARY that prepends <bos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_tiny_model(folder: Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, config: Any = None) -> Path:
    """Saves a random causal LM (default: a Llama of four blocks) and a tokenizer of whole words."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    save_word_tokenizer(folder, chat_template)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def save_tiny_sentence_encoder(folder: Path, pooling: str | None = "mean_tokens", max_tokens: int = 16) -> Path:
    """Saves a random BERT of two blocks with the vocabulary, in the layout of sentence-transformers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, VOCABULARY[token]) for token in ("<bos>", "<|end|>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <|end|>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{name}": name == pooling for name in ("mean_tokens", "cls_token", "lasttoken", pooling)}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return folder


def random_prompts(num_prompts: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 24))) for _ in range(num_prompts)]


def save_small_data(folder: Path) -> None:
    """Writes corpus.parquet, outcomes.parquet and pool.toml into a folder: 240 prompts and two targets.

    "small" is mostly right on prompts with the word "one", "big" on 90 % of all; 5 % of the outcomes are missing.
    """
    rng = np.random.default_rng(1)
    prompts = random_prompts(240, seed=1)
    ids = [f"p{i:03d}" for i in range(len(prompts))]
    pq.write_table(pa.table({"prompt_id": ids, "prompt": prompts, "note": ids}), folder / "corpus.parquet")
    rows = []
    for prompt_id, prompt in zip(ids, prompts, strict=True):
        chances = {"big": 0.9, "small": 0.95 if "one" in prompt.split() else 0.05}
        for target, chance in chances.items():
            if rng.random() > 0.05:
                tokens = int(rng.integers(20, 60)) + 3 * len(prompt.split())
                rows.append((prompt_id, target, float(rng.random() < chance), tokens))
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        {
            "prompt_id": columns[0],
            "target": columns[1],
            "correct": pa.array(columns[2], pa.float32()),
            "output_tokens": pa.array(columns[3], pa.int32()),
        }
    )
    pq.write_table(table, folder / "outcomes.parquet")
    (folder / "pool.toml").write_text(POOL_TOML)
