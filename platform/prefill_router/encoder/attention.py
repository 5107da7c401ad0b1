"""Causal attention over a pack: prompts laid end to end, without padding, each after an optional shared prefix.

One implementation a kind of hardware, all with the same result: variable-length kernels on CUDA, tiles of matrix
products on a CPU without AMX, SDPA elsewhere.

All but CUDA's kernels pad a prompt to whole tiles, counted from where it would begin without the prefix, and compute
those of as many tiles together. So the shapes of a prompt's products depend on itself alone, and on a CPU in bfloat16
not one bit of the result on what is computed beside it.
"""

# B prompts in a pack, T their tokens, S the longest, P tokens of the prefix; H heads, K key-value heads, E head size;
# V head size of values

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from prefill_router.encoder.hardware import has_amx

KeyValue = tuple[Tensor, Tensor]  # of one layer, each (P, K, E)

_SCORED_TILE = 256  # tokens in a tile of queries whose scores are written out
_TILE = 64  # tokens in a tile on the CPU: smaller ones waste the matrix unit, larger ones compute what causality hides


class Attention(Protocol):
    """Made for one pack, used by each layer."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        """(T, H, E), (T, K, E), (T, K, V) -> (T, H, V)."""
        ...


@dataclass(frozen=True)
class Scoring:
    """How a family's attention makes weights of the products of queries and keys, where it differs from most."""

    scale: float | None = None  # of the products, in place of E ** -0.5
    window: int | None = None  # a token sees so many, itself among them
    softcap: float | None = None  # a score becomes softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # (H,) a score of each head that takes weight from all keys and gives nothing


PLAIN = Scoring()


def attention_for(
    lengths: Sequence[int],
    prefix_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    scoring: Scoring = PLAIN,
) -> Attention:
    """The fastest exact implementation for a pack of prompts with `lengths` own tokens."""
    if scoring.window is not None and scoring.window >= prefix_tokens + max(lengths):
        scoring = replace(scoring, window=None)
    is_capped = scoring.softcap is not None or scoring.sinks is not None
    if not is_capped and device.type == "cuda" and dtype != torch.float32 and varlen_kernel() is not None:
        return VarlenAttention(lengths, prefix_tokens, device, scoring)
    if is_capped or scoring.window is not None:
        return ScoredAttention(lengths, prefix_tokens, device, scoring)
    is_tiled = device.type == "cpu" and not (dtype == torch.bfloat16 and has_amx())
    return (TiledAttention if is_tiled else PaddedAttention)(lengths, prefix_tokens, device, scoring)


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

    def __init__(
        self, lengths: Sequence[int], prefix_tokens: int, device: torch.device, scoring: Scoring = PLAIN
    ) -> None:
        self.options: dict[str, Any] = {"window_size": (scoring.window - 1 if scoring.window else -1, 0)}
        if scoring.scale is not None:
            self.options["scale"] = scoring.scale
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
        attended: Tensor = kernel(query, key, value, *ends, enable_gqa=True, **self.options)
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

    def __init__(
        self, lengths: Sequence[int], prefix_tokens: int, device: torch.device, scoring: Scoring = PLAIN
    ) -> None:
        self.prefix_tokens, self.scoring = prefix_tokens, scoring
        self.groups: list[_Alike] = []
        start = 0
        for num_tiles, own in groupby(lengths, lambda length: -(-(prefix_tokens + length) // _TILE)):
            self.groups.append(_Alike.of(start, list(own), num_tiles * _TILE - prefix_tokens, device))
            start = self.groups[-1].rows.stop

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        first_key, first_value = prefix or (None, None)
        attended = query.new_empty((*query.shape[:2], value.shape[-1]))
        for alike in self.groups:
            padded = alike.padded(query), alike.padded(key, first_key), alike.padded(value, first_value)
            alike.put(self._attend(alike, *padded), attended)
        return attended

    def _attend(self, alike: _Alike, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKV: Tensor) -> Tensor:
        if self.prefix_tokens and alike.mask is None:
            alike.mask = _causal_at_the_end(alike.longest, key_BLKE.shape[1], query_BSHE)
        return F.scaled_dot_product_attention(
            query_BSHE.transpose(1, 2),
            key_BLKE.transpose(1, 2),
            value_BLKV.transpose(1, 2),
            attn_mask=alike.mask,
            is_causal=alike.mask is None,
            scale=self.scoring.scale,
            enable_gqa=query_BSHE.shape[2] != key_BLKE.shape[2],
        ).transpose(1, 2)

    def _grouped(self, query_BSHE: Tensor, num_groups: int) -> Tensor:
        """Scaled queries (B, S, K, G, E), by the heads that share keys."""
        scale = query_BSHE.shape[-1] ** -0.5 if self.scoring.scale is None else self.scoring.scale
        scaled: Tensor = query_BSHE * scale
        return scaled.reshape(*scaled.shape[:2], num_groups, -1, scaled.shape[-1])


class TiledAttention(PaddedAttention):
    """Tiles of queries against the keys that causality lets them see, as batched matrix products."""

    def _attend(self, alike: _Alike, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKV: Tensor) -> Tensor:
        num_prompts, _, num_heads, head_size = query_BSHE.shape
        num_groups = key_BLKE.shape[2]
        per_group = num_heads // num_groups  # heads that share keys, G
        # All of a group's heads stand as rows of one matrix: (B * K, S * G, E).
        grouped = self._grouped(query_BSHE, num_groups).transpose(1, 2)
        queries = grouped.reshape(num_prompts * num_groups, -1, head_size)
        keys = key_BLKE.permute(0, 2, 3, 1).reshape(len(queries), head_size, -1)
        values = value_BLKV.transpose(1, 2).reshape(len(queries), -1, value_BLKV.shape[-1])
        attended = queries.new_empty((*queries.shape[:2], values.shape[-1]))
        hidden = torch.full((_TILE, _TILE), -torch.inf, dtype=queries.dtype).triu(1).repeat_interleave(per_group, 0)
        for start in range(-(self.prefix_tokens % _TILE), alike.longest, _TILE):
            visible = self.prefix_tokens + start + _TILE
            own = slice(max(start, 0) * per_group, (start + _TILE) * per_group)
            scores = queries[:, own] @ keys[:, :, :visible]
            scores[:, :, -_TILE:] += hidden[own.start - own.stop :]
            torch.bmm(scores.softmax(-1), values[:, :visible], out=attended[:, own])
        grouped = attended.view(num_prompts, num_groups, -1, per_group, values.shape[-1]).transpose(1, 2)
        return grouped.flatten(2, 3)


class ScoredAttention(PaddedAttention):
    """Attention with windows, capped scores or sinks: tile by tile, each against the keys that it may see."""

    def _attend(self, alike: _Alike, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKV: Tensor) -> Tensor:
        longest, num_groups, window = alike.longest, key_BLKE.shape[2], self.scoring.window
        grouped = self._grouped(query_BSHE, num_groups)
        queries = grouped.permute(0, 2, 3, 1, 4)  # (B, K, G, S, E)
        keys, values = (x.transpose(1, 2)[:, :, None] for x in (key_BLKE, value_BLKV))  # (B, K, 1, P + S, .)
        tiles = []
        for start in range(0, longest, _SCORED_TILE):
            stop = min(start + _SCORED_TILE, longest)
            first = max(0, self.prefix_tokens + start + 1 - window) if window is not None else 0
            seen = slice(first, self.prefix_tokens + stop)
            scores = (queries[..., start:stop, :] @ keys[..., seen, :].transpose(-1, -2)).float()
            weights = self._weights(scores, self.prefix_tokens + start - first)
            tiles.append(weights.to(values.dtype) @ values[..., seen, :])
        return torch.cat(tiles, -2).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _weights(self, scores: Tensor, num_before: int) -> Tensor:
        """(B, K, G, S, L), of which the first token sees `num_before` keys before its own."""
        if self.scoring.softcap is not None:
            scores = torch.tanh(scores / self.scoring.softcap) * self.scoring.softcap
        own = torch.arange(num_before, num_before + scores.shape[-2], device=scores.device)[:, None]
        keys = torch.arange(scores.shape[-1], device=scores.device)
        is_hidden = keys > own
        if self.scoring.window is not None:
            is_hidden |= keys <= own - self.scoring.window
        scores = scores.masked_fill(is_hidden, -torch.inf)
        if self.scoring.sinks is None:
            return scores.softmax(-1)
        sinks: Tensor = self.scoring.sinks.float().view(1, scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights: Tensor = torch.cat((scores, sinks), -1).softmax(-1)
        return weights[..., :-1]
