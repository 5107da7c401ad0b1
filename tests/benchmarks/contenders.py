"""What reads prompts in the benchmarks: loops over a transformers model as people write them, and our engine.

The loops share no code with the engine but the loading of weights, so that they also check what it returns.
"""

# N prompts, B of a batch, S tokens of the longest, D hidden size

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.prefixes import PrefixGroup

Pooled = dict[str, NDArray[Any]]  # (N, D) for each column


class Contender(Protocol):
    name: str

    @property
    def dtype(self) -> str: ...

    def run(self, prompts: Sequence[Prompt]) -> tuple[Pooled, Work]:
        """Prompts to pooled activations on the host, tokenisation included."""
        ...


@dataclass
class Loop:
    """What the loops have in common: the chat template, padding on the right, and a mask."""

    name: str
    model: Any
    tokenizer: Any
    batch_size: int

    @classmethod
    def load(cls, name: str, source: str, device: torch.device, dtype: str, batch_size: int) -> Self:
        loaded = checkpoint.load_causal_lm(source, None, getattr(torch, dtype))
        return cls(name, loaded.model.to(device).eval(), loaded.tokenizer, batch_size)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def tokenize(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        texts = self.tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def hidden_states(self, model: Any, ids: list[list[int]], **options: bool) -> tuple[Tensor, ...]:
        """(B, S, D) of each layer."""
        rows = [torch.tensor(row) for row in ids]
        padded = pad_sequence(rows, batch_first=True).to(model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        outputs = model(input_ids=padded, attention_mask=mask, output_hidden_states=True, **options)
        states: tuple[Tensor, ...] = outputs.hidden_states
        return states


class PeerLoop(Loop):
    """Batches in arrival order, logits computed, all layers kept, every row of each copied to the host by itself."""

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt]) -> tuple[Pooled, Work]:
        pooled: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        work = Work()
        for start in range(0, len(prompts), self.batch_size):
            ids = self.tokenize(prompts[start : start + self.batch_size])
            hidden = self.hidden_states(self.model, ids)
            for layer, row in itertools.product(range(len(hidden)), range(len(ids))):
                states = hidden[layer][row].float().cpu().numpy()[: len(ids[row])]
                pooled[_column("last", layer)].append(states[-1].copy())  # a view would keep the layer alive
                pooled[_column("mean", layer)].append(states.mean(0))
            work += _padded_work(ids)
        return {column: np.stack(rows) for column, rows in pooled.items()}, work


class SortedLoop(Loop):
    """Batches of similar lengths through the backbone alone, pooled row by row where the states are."""

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt]) -> tuple[Pooled, Work]:
        ids = self.tokenize(prompts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        pooled: dict[str, list[Tensor]] = defaultdict(list)
        work = Work()
        for start in range(0, len(order), self.batch_size):
            batch = [ids[i] for i in order[start : start + self.batch_size]]
            for layer, padded in enumerate(self.hidden_states(self.model.base_model, batch, use_cache=False)):
                rows = [states[: len(own)] for states, own in zip(padded, batch, strict=True)]
                pooled[_column("last", layer)].append(torch.stack([row[-1].float() for row in rows]).cpu())
                means = [row.mean(0, dtype=torch.float32) for row in rows]
                pooled[_column("mean", layer)].append(torch.stack(means).cpu())
            work += _padded_work(batch)
        back = np.argsort(order)
        return {column: torch.cat(parts).numpy()[back] for column, parts in pooled.items()}, work


def _column(pooling: str, layer: int) -> str:
    return f"{pooling}_{layer:03d}"


def _padded_work(ids: list[list[int]]) -> Work:
    tokens = sum(map(len, ids))
    padded = max(map(len, ids)) * len(ids) - tokens
    return Work(prompts=len(ids), tokens=tokens, computed_tokens=tokens, padded_tokens=padded)


@dataclass
class Engine:
    name: str
    encoder: PrefillEncoder
    columns: list[ActivationColumn]

    @property
    def dtype(self) -> str:
        return str(self.encoder.spec.dtype)

    def run(self, prompts: Sequence[Prompt]) -> tuple[Pooled, Work]:
        encoded, work = self.encoder.forward(self.encoder.tokenize(prompts), self.columns)
        return {column: values for column, values in encoded.items() if column != NUM_TOKENS}, work


class UnsharedEngine(Engine):
    """The engine, but what prompts have in common at their beginning is computed for each."""

    def run(self, prompts: Sequence[Prompt]) -> tuple[Pooled, Work]:
        with mock.patch("prefill_router.encoder.prefill_encoder.shared_prefixes", _apart):
            return super().run(prompts)


def _apart(ids: list[list[int]], **_: int) -> list[PrefixGroup]:
    return [PrefixGroup(0, list(range(len(ids))))]
