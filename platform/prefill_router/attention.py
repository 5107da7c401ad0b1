"""Causal attention over a pack: prompts laid end to end, without padding, each after an optional shared prefix.

One implementation a kind of hardware, all with the same result: variable-length kernels on CUDA, tiles of matrix
products on a CPU without AMX, SDPA elsewhere.

All but CUDA's kernels pad a prompt to whole tiles, counted from where it would begin without the prefix, and compute
those of as many tiles together. So the shapes of a prompt's products depend on itself alone, and on a CPU in bfloat16
not one bit of the result on what is computed beside it.
"""

# B prompts in a pack, T their tokens, S the longest, P tokens of the prefix; H heads, K key-value heads, E head size

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
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
    is_tiled = device.type == "cpu" and not (dtype == torch.bfloat16 and has_amx())
    return (TiledAttention if is_tiled else PaddedAttention)(lengths, prefix_tokens, device)


# What torch.nn.attention holds brings all of torch.compile, a quarter of a worker's start: it waits until it is used.


@functools.cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Torch's, where it takes fewer heads of keys than of queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def _causal_at_the_end(num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return torch.full((num_queries, num_keys), -torch.inf, dtype=like.dtype).triu(num_keys - num_queries + 1)
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


@dataclass
class _Alike:
    """Neighbours in a pack that fill as many tiles, and how they are padded to `longest` own tokens each."""

    rows: slice  # of the pack
    num_prompts: int
    longest: int
    spread: Tensor | None = None  # these rows as (B, S), the last token of a prompt repeated; None where they are so
    gathered: Tensor | None = None  # and back
    mask: Tensor | None = None

    @classmethod
    def of(cls, start: int, lengths: Sequence[int], longest: int, device: torch.device) -> _Alike:
        alike = cls(slice(start, start + sum(lengths)), len(lengths), longest)
        if min(lengths) < longest:
            own = torch.tensor(lengths)[:, None]
            column = torch.arange(longest)[None]
            rows = own.cumsum(0) - own + torch.minimum(column, own - 1)
            alike.spread = rows.flatten().to(device)
            alike.gathered = (column < own).flatten().nonzero()[:, 0].to(device)
        return alike

    def padded(self, own: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(T, heads, E) -> (B, P + S, heads, E)."""
        own = own[self.rows]
        if self.spread is not None:
            own = own.index_select(0, self.spread)
        own = own.reshape(self.num_prompts, self.longest, *own.shape[1:])
        return own if prefix is None else torch.cat((prefix.expand(self.num_prompts, *prefix.shape), own), 1)

    def put(self, padded: Tensor, whole: Tensor) -> None:
        """(B, S, heads, E) into the rows of (T, heads, E)."""
        flat, own = padded.flatten(0, 1), whole[self.rows]
        if self.gathered is None:
            own.copy_(flat)
        else:
            torch.index_select(flat, 0, self.gathered, out=own)


class PaddedAttention:
    """SDPA over prompts padded at their right end, where causality hides the padding.

    A prompt is padded to whole tiles, the prefix counted; neighbours of as many tiles are computed together.
    """

    def __init__(self, lengths: Sequence[int], prefix_tokens: int, device: torch.device) -> None:
        self.prefix_tokens = prefix_tokens
        self.groups: list[_Alike] = []
        start = 0
        for num_tiles, own in groupby(lengths, lambda length: -(-(prefix_tokens + length) // _TILE)):
            self.groups.append(_Alike.of(start, list(own), num_tiles * _TILE - prefix_tokens, device))
            start = self.groups[-1].rows.stop

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        first_key, first_value = prefix or (None, None)
        attended = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for alike in self.groups:
            padded = alike.padded(query), alike.padded(key, first_key), alike.padded(value, first_value)
            alike.put(self._attend(alike, *padded), attended)
        return attended

    def _attend(self, alike: _Alike, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKE: Tensor) -> Tensor:
        if self.prefix_tokens and alike.mask is None:
            alike.mask = _causal_at_the_end(alike.longest, key_BLKE.shape[1], query_BSHE)
        return F.scaled_dot_product_attention(
            query_BSHE.transpose(1, 2),
            key_BLKE.transpose(1, 2),
            value_BLKE.transpose(1, 2),
            attn_mask=alike.mask,
            is_causal=alike.mask is None,
            enable_gqa=query_BSHE.shape[2] != key_BLKE.shape[2],
        ).transpose(1, 2)


class TiledAttention(PaddedAttention):
    """Tiles of queries against the keys that causality lets them see, as batched matrix products."""

    def _attend(self, alike: _Alike, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKE: Tensor) -> Tensor:
        num_prompts, _, num_heads, head_size = query_BSHE.shape
        num_groups = key_BLKE.shape[2]
        per_group = num_heads // num_groups  # heads that share keys, G
        # All of a group's heads stand as rows of one matrix: (B * K, S * G, E).
        grouped = (query_BSHE * head_size**-0.5).unflatten(2, (num_groups, per_group)).transpose(1, 2)
        queries = grouped.reshape(num_prompts * num_groups, -1, head_size)
        keys = key_BLKE.permute(0, 2, 3, 1).reshape(len(queries), head_size, -1)
        values = value_BLKE.transpose(1, 2).reshape(len(queries), -1, head_size)
        attended = torch.empty_like(queries)
        hidden = torch.full((_TILE, _TILE), -torch.inf, dtype=queries.dtype).triu(1).repeat_interleave(per_group, 0)
        for start in range(-(self.prefix_tokens % _TILE), alike.longest, _TILE):
            visible = self.prefix_tokens + start + _TILE
            own = slice(max(start, 0) * per_group, (start + _TILE) * per_group)
            scores = queries[:, own] @ keys[:, :, :visible]
            scores[:, :, -_TILE:] += hidden[own.start - own.stop :]
            torch.bmm(scores.softmax(-1), values[:, :visible], out=attended[:, own])
        grouped = attended.view(num_prompts, num_groups, -1, per_group, head_size).transpose(1, 2)
        return grouped.flatten(2, 3)
