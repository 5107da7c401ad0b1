"""Sentence embeddings: the input of the semantic baseline routers, and a sensor of routers.

Supports bidirectional models in the sentence-transformers format. The last hidden states are pooled as the model's
config says and scaled to unit length.
"""

# N prompts, D hidden size, B prompts in a batch, S tokens of the longest

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefill_router.common.console import doing
from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint
from prefill_router.encoder.architecture import block_cost, find_blocks
from prefill_router.encoder.batching import token_budget_batches
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.hardware import bound_kernel_caches, preferred_dtype
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.tokenization import Tokens

_BUDGET_TOKENS = {"cpu": 2048, "cuda": 65536}
_Pooling = Literal["mean", "cls", "last"]
_POOLINGS: dict[str, _Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


class SentenceEncoder:
    """A bidirectional model with its tokenizer and pooling. Create one with `SentenceEncoder.load`."""

    def __init__(self, source: str, loaded: checkpoint.Checkpoint, pooling: _Pooling, max_tokens: int) -> None:
        self.name, self.model, self.tokenizer = source, loaded.model.eval().requires_grad_(False), loaded.tokenizer
        self.pooling, self.max_tokens = pooling, max_tokens
        dtype = str(self.model.dtype)
        parts = [loaded.weights_id, pooling, max_tokens, dtype, loaded.tokenizer.backend_tokenizer.to_str()]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        self.spec = EncoderSpec(model=source, dtype=dtype.removeprefix("torch."), max_tokens=max_tokens)
        self.device, self.dtype, self.devices = self.model.device, self.model.dtype, [self.model.device]
        blocks = find_blocks(self.model)
        self.num_layers, self.cost = len(blocks), block_cost(blocks[0], self.model.config)
        self._lock = threading.Lock()  # fast tokenizers are not thread-safe

    @classmethod
    @doing("loading the sentence encoder")
    def load(cls, source: str, device: str | None = None) -> SentenceEncoder:
        """Loads a hub id, a directory or `package:NAME`, by default on CUDA if available, otherwise on the CPU.

        Raises UserError if it cannot be loaded.
        """
        bound_kernel_caches()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded, folder = checkpoint.load_sentence_model(source, getattr(torch, preferred_dtype(device)))
        loaded.model.to(device)
        positions = getattr(loaded.model.config, "max_position_embeddings", 512)
        max_tokens = _read_json(folder / "sentence_bert_config.json").get("max_seq_length", positions)
        return cls(source, loaded, _pooling(folder), min(max_tokens, positions))

    def tokenize(self, prompts: Sequence[Prompt]) -> Tokens:
        """Returns token ids, cut to the first `max_tokens`. A conversation becomes one line per message."""
        if not prompts:
            return Tokens([], np.zeros(0, np.int32))
        texts = [p if isinstance(p, str) else "\n".join(m["content"] for m in p) for p in prompts]
        with self._lock:
            ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        lengths = np.array([len(i) for i in ids], np.int32)
        # A cut prompt keeps the end-of-sequence token.
        cut = [i if len(i) <= self.max_tokens else [*i[: self.max_tokens - 1], i[-1]] for i in ids]
        return Tokens(cut, lengths)

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(
            kind="sentence",
            spec=self.spec,
            num_layers=self.num_layers,
            hidden_size=self.model.config.hidden_size,
            fingerprint=self.fingerprint,
        )

    def read(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> EncodedPrompts:
        """Does for its one column what `PrefillEncoder.read` does."""
        tokens = self.tokenize(prompts)
        return EncodedPrompts(*self.forward(tokens, columns), tokens.full_lengths)

    def forward(self, tokens: Tokens, columns: Sequence[ActivationColumn]) -> tuple[dict[str, NDArray[Any]], Work]:
        """Returns embeddings (N, D) float16 for its one column, `num_tokens` (N,), and the work done."""
        started = time.perf_counter()
        (column,) = columns
        embeddings = self.embed_tokens(tokens).astype(np.float16)
        lengths = tokens.num_tokens.tolist()
        flops = self.cost.flops(lengths, 0, self.num_layers)
        work = Work(len(lengths), sum(lengths), sum(lengths), flops=flops, seconds=time.perf_counter() - started)
        return {column.name: embeddings, NUM_TOKENS: tokens.num_tokens}, work

    @torch.inference_mode()
    def embed_tokens(self, tokens: Tokens) -> NDArray[np.float32]:
        """Returns embeddings (N, D) of unit length."""
        lengths = tokens.num_tokens.tolist()
        embeddings = np.empty((len(lengths), self.model.config.hidden_size), np.float32)
        device = self.model.device
        for batch in token_budget_batches(lengths, _BUDGET_TOKENS.get(device.type, _BUDGET_TOKENS["cpu"])):
            rows = [torch.tensor(tokens.ids[i]) for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]).to(device)
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            pooled = _pooled(states.float(), mask, self.pooling)
            embeddings[batch] = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return embeddings

    def embed(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return self.embed_tokens(self.tokenize(prompts))


def _pooled(states_BSD: Tensor, mask_BS: Tensor, pooling: _Pooling) -> Tensor:
    if pooling == "cls":
        return states_BSD[:, 0]
    if pooling == "last":
        return states_BSD[torch.arange(len(states_BSD), device=states_BSD.device), mask_BS.sum(1) - 1]
    weights = mask_BS[..., None].float()
    return (states_BSD * weights).sum(1) / weights.sum(1)


def _pooling(folder: Path) -> _Pooling:
    """Returns the pooling in the model's files, or `mean` if they have none."""
    config = _read_json(folder / "1_Pooling" / "config.json")
    modes = [key for key, is_on in config.items() if key.startswith("pooling_mode_") and is_on]
    if len(modes) > 1 or any(mode not in _POOLINGS for mode in modes):
        supported = ", ".join(_POOLINGS)
        raise UserError(f"{folder}: {', '.join(modes)} is not supported: choose a model with one of {supported}")
    return _POOLINGS[modes[0]] if modes else "mean"


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
