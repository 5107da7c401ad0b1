"""What tests of every package share: a tiny random causal LM, a small corpus with outcomes, and a real local Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

SHARED = Path(__file__).parents[2] / "shared"
MMLU_PRO = SHARED / "data" / "mmlu_pro"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "what is the sum of one two three four five six plus minus name a river in that big old town".split()
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


def save_tiny_model(folder: Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A random Llama of four blocks, and a tokenizer of whole words, as a transformers directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *map(str, range(100))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny_model"))


def random_prompts(num_prompts: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 24))) for _ in range(num_prompts)]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.parquet, outcomes.parquet and pool.toml: 240 prompts and two targets.

    "small" is right on prompts that hold the word "one", "big" on nearly all; 5 % of the outcomes are missing.
    """
    folder = tmp_path_factory.mktemp("small_data")
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
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One real Ray on this machine for all tests that need it."""
    import ray

    from prefill_jobs import cluster

    ray.init(num_cpus=4, object_store_memory=200_000_000, logging_level="ERROR", log_to_driver=False)
    cluster.connect()
    yield
    ray.shutdown()
