"""Causal attention over a pack: prompts laid end to end, without padding, each after an optional shared prefix.

One implementation a kind of hardware, all with the same result: variable-length kernels on CUDA, tiles of matrix
products on a CPU without AMX, SDPA elsewhere.

On a CPU prompts are padded to whole tiles, counted from where they would begin without the prefix: so the shapes of a
prompt's products depend on itself alone, and in bfloat16 not one bit of the result on what is computed beside it.
"""

# B prompts in a pack, T their tokens, S the longest, P tokens of the prefix; H heads, K key-value heads, E head size

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from prefill_router.hardware import has_amx

KeyValue = tuple[Tensor, Tensor]  # of one layer, each (P, K, E)

_TILE = 64  # tokens in a tile on the CPU: smaller ones waste the matrix unit, larger ones compute what causality hides


class Attention(Protocol):
    """Made for one pack, used by each layer."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        """(T, H, E), (T, K, E), (T, K, E) -> (T, H, E). Scores are scaled by E ** -0.5."""
        ...


def attention_for(lengths: Sequence[int], prefix_tokens: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest exact implementation for a pack of prompts with `lengths` own tokens."""
    if device.type == "cuda" and dtype != torch.float32 and varlen_kernel() is not None:
        return VarlenAttention(lengths, prefix_tokens, device)
    if device.type != "cpu":
        return PaddedAttention(lengths, prefix_tokens, device)
    kind = WholeTilesAttention if dtype == torch.bfloat16 and has_amx() else TiledAttention
    return kind(lengths, prefix_tokens, device)


# What torch.nn.attention holds brings all of torch.compile, a quarter of a worker's start: it waits until it is used.


@functools.cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Torch's, where it takes fewer heads of keys than of queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def _causal_at_the_end(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    from torch.nn.attention.bias import causal_lower_right

    mask: Tensor = causal_lower_right(num_queries, num_keys)
    return mask


class VarlenAttention:
    """Flash attention's variable-length kernel: no padding at all."""

    def __init__(self, lengths: Sequence[int], prefix_tokens: int, device: torch.device) -> None:
        own = torch.tensor(lengths)
        self.max_query, self.max_key = int(own.max()), int(own.max()) + prefix_tokens
        self.query_ends = F.pad(own.cumsum(0), (1, 0)).to(device, torch.int32)
        self.key_ends = F.pad((own + prefix_tokens).cumsum(0), (1, 0)).to(device, torch.int32)
        # Each prompt's keys: the prefix, which stands first, then its own.
        starts = prefix_tokens + own.cumsum(0) - own
        rows = [torch.cat((torch.arange(prefix_tokens), s + torch.arange(n))) for s, n in zip(starts, own, strict=True)]
        self.key_rows = torch.cat(rows).to(device) if prefix_tokens else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        if prefix is not None and self.key_rows is not None:
            key = torch.cat((prefix[0], key)).index_select(0, self.key_rows)
            value = torch.cat((prefix[1], value)).index_select(0, self.key_rows)
        ends = (self.query_ends, self.key_ends, self.max_query, self.max_key)
        # Where there are more keys than queries, the kernel aligns both at their ends, as a prefix wants it.
        kernel = varlen_kernel()
        assert kernel is not None
        attended: Tensor = kernel(query, key, value, *ends, window_size=(-1, 0), enable_gqa=True)
        return attended


class PaddedAttention:
    """SDPA over prompts padded at their right end, where causality hides the padding.

    With the prefix, what is padded has a `multiple` of so many tokens.
    """

    multiple = 1

    def __init__(self, lengths: Sequence[int], prefix_tokens: int, device: torch.device) -> None:
        self.num_prompts, self.prefix_tokens, self.device = len(lengths), prefix_tokens, device
        self.longest = max(lengths) + -(prefix_tokens + max(lengths)) % self.multiple
        self.spread: Tensor | None = None  # rows of the pack as (B, S), the last token of a prompt repeated
        self.gathered: Tensor | None = None  # and back
        if min(lengths) < self.longest:
            own = torch.tensor(lengths)[:, None]
            column = torch.arange(self.longest)[None]
            rows = own.cumsum(0) - own + torch.minimum(column, own - 1)
            self.spread = rows.flatten().to(device)
            self.gathered = (column < own).flatten().nonzero()[:, 0].to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        query_BSHE, key_BLKE, value_BLKE = self._padded(query, key, value, prefix)
        attended = F.scaled_dot_product_attention(
            query_BSHE.transpose(1, 2),
            key_BLKE.transpose(1, 2),
            value_BLKE.transpose(1, 2),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self._packed(attended.transpose(1, 2))

    @functools.cached_property
    def _mask(self) -> Tensor | None:
        num_keys = self.prefix_tokens + self.longest
        return _causal_at_the_end(self.longest, num_keys, self.device) if self.prefix_tokens else None

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> tuple[Tensor, ...]:
        """The pack as (B, S, heads, E); keys and values as (B, P + S, heads, E)."""
        if self.spread is not None:
            query, key, value = (t.index_select(0, self.spread) for t in (query, key, value))
        shape = (self.num_prompts, self.longest)
        query, key, value = (t.reshape(*shape, *t.shape[1:]) for t in (query, key, value))
        if prefix is not None:
            first = (t.expand(self.num_prompts, *t.shape) for t in prefix)
            key, value = (torch.cat((p, own), 1) for p, own in zip(first, (key, value), strict=True))
        return query, key, value

    def _packed(self, attended_BSHE: Tensor) -> Tensor:
        flat = attended_BSHE.flatten(0, 1)
        return flat if self.gathered is None else flat.index_select(0, self.gathered)


class WholeTilesAttention(PaddedAttention):
    """SDPA over whole tiles."""

    multiple = _TILE


class TiledAttention(PaddedAttention):
    """Tiles of queries against the keys that causality lets them see, as batched matrix products."""

    multiple = _TILE

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        num_heads, head_size, num_groups = query.shape[1], query.shape[2], key.shape[1]
        per_group = num_heads // num_groups  # heads that share keys, G
        query, key, value = self._padded(query * head_size**-0.5, key, value, prefix)
        # All of a group's heads stand as rows of one matrix: (B * K, S * G, E).
        grouped = query.view(*query.shape[:2], num_groups, per_group, head_size).transpose(1, 2)
        queries = grouped.reshape(self.num_prompts * num_groups, -1, head_size)
        keys = key.permute(0, 2, 3, 1).reshape(len(queries), head_size, -1)
        values = value.transpose(1, 2).reshape(len(queries), -1, head_size)
        attended = torch.empty_like(queries)
        hidden = torch.full((_TILE, _TILE), -torch.inf, dtype=queries.dtype).triu(1).repeat_interleave(per_group, 0)
        for start in range(-(self.prefix_tokens % _TILE), self.longest, _TILE):
            visible = self.prefix_tokens + start + _TILE
            own = slice(max(start, 0) * per_group, (start + _TILE) * per_group)
            scores = queries[:, own] @ keys[:, :, :visible]
            scores[:, :, -_TILE:] += hidden[own.start - own.stop :]
            torch.bmm(scores.softmax(-1), values[:, :visible], out=attended[:, own])
        grouped = attended.view(self.num_prompts, num_groups, self.longest, per_group, head_size).transpose(1, 2)
        return self._packed(grouped.reshape(self.num_prompts, self.longest, num_heads, head_size))
