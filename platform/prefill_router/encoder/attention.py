"""Causal attention over a pack: prompts concatenated without padding, each after an optional shared prefix.

There is one implementation per kind of hardware, all with the same result: variable-length kernels on CUDA, tiled
matrix products on a CPU without AMX, SDPA elsewhere.

All but the CUDA kernels pad each prompt to whole tiles, counted from the start of its prefix, and compute prompts with
the same number of tiles together. The shapes of a prompt's matrix products then depend on that prompt only. On a CPU in
bfloat16 this makes the result bit-identical whatever else is in the pack.
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

KeyValue = tuple[Tensor, Tensor]  # keys and values of one layer, each (P, K, E)

_SCORED_TILE = 256  # query tokens per tile in ScoredAttention, which materialises the scores
_TILE = 64  # tokens per tile elsewhere: smaller tiles underuse the matrix unit, larger ones compute more masked scores


class Attention(Protocol):
    """Attention over one pack, called once per layer."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        """(T, H, E), (T, K, E), (T, K, V) -> (T, H, V)."""
        ...


@dataclass(frozen=True)
class Scoring:
    """How a model family computes attention weights, where it differs from scaled dot-product attention."""

    scale: float | None = None  # replaces E ** -0.5
    window: int | None = None  # tokens that a query attends to, its own included
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # (H,) a score per head that joins the softmax but has no value


PLAIN = Scoring()


def attention_for(
    lengths: Sequence[int],
    prefix_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    scoring: Scoring = PLAIN,
) -> Attention:
    """Returns the fastest exact implementation for a pack of prompts with `lengths` tokens after the prefix."""
    if scoring.window is not None and scoring.window >= prefix_tokens + max(lengths):
        scoring = replace(scoring, window=None)
    is_capped = scoring.softcap is not None or scoring.sinks is not None
    if not is_capped and device.type == "cuda" and dtype != torch.float32 and varlen_kernel() is not None:
        return VarlenAttention(lengths, prefix_tokens, device, scoring)
    if is_capped or scoring.window is not None:
        return ScoredAttention(lengths, prefix_tokens, device, scoring)
    is_tiled = device.type == "cpu" and not (dtype == torch.bfloat16 and has_amx())
    return (TiledAttention if is_tiled else PaddedAttention)(lengths, prefix_tokens, device, scoring)


# torch.nn.attention imports all of torch.compile, a quarter of a worker's start-up time: import it on first use.


@functools.cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Returns torch's variable-length kernel, or None if it is absent or does not support grouped-query attention."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def _causal_mask(num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    """Builds a causal mask whose last query sees all keys, with the dtype and device of `like`."""
    if like.device.type == "cpu":
        return torch.full((num_queries, num_keys), -torch.inf, dtype=like.dtype).triu(num_keys - num_queries + 1)
    from torch.nn.attention.bias import causal_lower_right

    mask: Tensor = causal_lower_right(num_queries, num_keys)
    return mask


class VarlenAttention:
    """Flash attention's variable-length kernel, without any padding."""

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
        # Row indices of each prompt's keys: the prefix at the front, then its own.
        starts = prefix_tokens + own.cumsum(0) - own
        rows = [torch.cat((torch.arange(prefix_tokens), s + torch.arange(n))) for s, n in zip(starts, own, strict=True)]
        self.key_rows = torch.cat(rows).to(device) if prefix_tokens else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        if prefix is not None and self.key_rows is not None:
            key = torch.cat((prefix[0], key)).index_select(0, self.key_rows)
            value = torch.cat((prefix[1], value)).index_select(0, self.key_rows)
        ends = (self.query_ends, self.key_ends, self.max_query, self.max_key)
        # With more keys than queries, the kernel aligns both at their ends, which is right for a prefix.
        kernel = varlen_kernel()
        assert kernel is not None
        attended: Tensor = kernel(query, key, value, *ends, enable_gqa=True, **self.options)
        return attended


@dataclass
class _TileGroup:
    """Consecutive prompts of a pack that fill the same number of tiles, padded to `longest` tokens each."""

    rows: slice  # of the pack
    num_prompts: int
    longest: int
    to_padded: Tensor | None = None  # (B * S,) row of each padded token, the last one repeated; None without padding
    from_padded: Tensor | None = None  # (T,) padded position of each row
    mask: Tensor | None = None

    @classmethod
    def of(cls, start: int, lengths: Sequence[int], longest: int, device: torch.device) -> _TileGroup:
        group = cls(slice(start, start + sum(lengths)), len(lengths), longest)
        if min(lengths) < longest:
            own = torch.tensor(lengths)[:, None]
            column = torch.arange(longest)[None]
            rows = own.cumsum(0) - own + torch.minimum(column, own - 1)
            group.to_padded = rows.flatten().to(device)
            group.from_padded = (column < own).flatten().nonzero()[:, 0].to(device)
        return group

    def padded(self, own: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(T, heads, E) -> (B, P + S, heads, E)."""
        own = own[self.rows]
        if self.to_padded is not None:
            own = own.index_select(0, self.to_padded)
        own = own.reshape(self.num_prompts, self.longest, *own.shape[1:])
        return own if prefix is None else torch.cat((prefix.expand(self.num_prompts, *prefix.shape), own), 1)

    def unpad_into(self, whole: Tensor, padded: Tensor) -> None:
        """Writes (B, S, heads, E) to this group's rows of (T, heads, E)."""
        flat, own = padded.flatten(0, 1), whole[self.rows]
        if self.from_padded is None:
            own.copy_(flat)
        else:
            torch.index_select(flat, 0, self.from_padded, out=own)


class PaddedAttention:
    """SDPA over right-padded prompts: causality hides the padding.

    A prompt and its prefix are padded to whole tiles; consecutive prompts with equal tile counts form one batch.
    """

    def __init__(
        self, lengths: Sequence[int], prefix_tokens: int, device: torch.device, scoring: Scoring = PLAIN
    ) -> None:
        self.prefix_tokens, self.scoring = prefix_tokens, scoring
        self.groups: list[_TileGroup] = []
        start = 0
        for num_tiles, own in groupby(lengths, lambda length: -(-(prefix_tokens + length) // _TILE)):
            self.groups.append(_TileGroup.of(start, list(own), num_tiles * _TILE - prefix_tokens, device))
            start = self.groups[-1].rows.stop

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeyValue | None) -> Tensor:
        first_key, first_value = prefix or (None, None)
        attended = query.new_empty((*query.shape[:2], value.shape[-1]))
        for group in self.groups:
            padded = group.padded(query), group.padded(key, first_key), group.padded(value, first_value)
            group.unpad_into(attended, self._attend(group, *padded))
        return attended

    def _attend(self, group: _TileGroup, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKV: Tensor) -> Tensor:
        if self.prefix_tokens and group.mask is None:
            group.mask = _causal_mask(group.longest, key_BLKE.shape[1], query_BSHE)
        return F.scaled_dot_product_attention(
            query_BSHE.transpose(1, 2),
            key_BLKE.transpose(1, 2),
            value_BLKV.transpose(1, 2),
            attn_mask=group.mask,
            is_causal=group.mask is None,
            scale=self.scoring.scale,
            enable_gqa=query_BSHE.shape[2] != key_BLKE.shape[2],
        ).transpose(1, 2)

    def _grouped(self, query_BSHE: Tensor, num_groups: int) -> Tensor:
        """Returns scaled queries (B, S, K, G, E), grouped by the heads that share keys."""
        scale = query_BSHE.shape[-1] ** -0.5 if self.scoring.scale is None else self.scoring.scale
        scaled: Tensor = query_BSHE * scale
        return scaled.reshape(*scaled.shape[:2], num_groups, -1, scaled.shape[-1])


class TiledAttention(PaddedAttention):
    """Multiplies each tile of queries with only the keys visible to it, as batched matrix products."""

    def _attend(self, group: _TileGroup, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKV: Tensor) -> Tensor:
        num_prompts, _, num_heads, head_size = query_BSHE.shape
        num_groups = key_BLKE.shape[2]
        per_group = num_heads // num_groups  # heads that share keys, G
        # The heads that share keys become rows of one matrix: (B * K, S * G, E).
        grouped = self._grouped(query_BSHE, num_groups).transpose(1, 2)
        queries = grouped.reshape(num_prompts * num_groups, -1, head_size)
        keys = key_BLKE.permute(0, 2, 3, 1).reshape(len(queries), head_size, -1)
        values = value_BLKV.transpose(1, 2).reshape(len(queries), -1, value_BLKV.shape[-1])
        attended = queries.new_empty((*queries.shape[:2], values.shape[-1]))
        hidden = torch.full((_TILE, _TILE), -torch.inf, dtype=queries.dtype).triu(1).repeat_interleave(per_group, 0)
        for start in range(-(self.prefix_tokens % _TILE), group.longest, _TILE):
            visible = self.prefix_tokens + start + _TILE
            own = slice(max(start, 0) * per_group, (start + _TILE) * per_group)
            scores = queries[:, own] @ keys[:, :, :visible]
            scores[:, :, -_TILE:] += hidden[own.start - own.stop :]
            torch.bmm(scores.softmax(-1), values[:, :visible], out=attended[:, own])
        grouped = attended.view(num_prompts, num_groups, -1, per_group, values.shape[-1]).transpose(1, 2)
        return grouped.flatten(2, 3)


class ScoredAttention(PaddedAttention):
    """Attention with windows, soft-capped scores or sinks, computed by tiles of queries and their visible keys."""

    def _attend(self, group: _TileGroup, query_BSHE: Tensor, key_BLKE: Tensor, value_BLKV: Tensor) -> Tensor:
        longest, num_groups, window = group.longest, key_BLKE.shape[2], self.scoring.window
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
        """Returns attention weights (B, K, G, S, L). The first query has `num_before` keys before its own."""
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
