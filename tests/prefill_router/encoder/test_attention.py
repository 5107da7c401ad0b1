"""Attention is compared with causal softmax attention in float64, one prompt at a time.

The kernel of `VarlenAttention` runs on CUDA only (see test_cuda.py). Here a reference implementation replaces it, so
that its arguments are checked on every machine.
"""

# T tokens of a pack, P of the prefix, H heads, K key-value heads, E head size

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefill_router.encoder import attention
from prefill_router.encoder.attention import (
    PLAIN,
    Attention,
    KeyValue,
    PaddedAttention,
    ScoredAttention,
    Scoring,
    TiledAttention,
    VarlenAttention,
    attention_for,
)
from prefill_router.encoder.hardware import has_amx
from reference import causal_softmax

CPU = torch.device("cpu")
HEAD_SIZE = 16
# One token, one less than a tile, a tile, one more, several tiles, a mixture, equal lengths.
LENGTHS = [[1], [63], [64], [65], [200], [3, 1, 65, 64, 63, 130], [64, 64, 64], [1, 1, 1, 1]]
PREFIXES = [0, 1, 64, 100]
HEADS = [(4, 4), (6, 2), (4, 1)]
KINDS: list[Any] = [TiledAttention, PaddedAttention, VarlenAttention]

Inputs = tuple[Tensor, Tensor, Tensor, KeyValue | None]


def expected(inputs: Inputs, lengths: Sequence[int], scoring: Scoring = PLAIN) -> Tensor:
    query, key, value, prefix = inputs
    first = [t.double() for t in prefix] if prefix else [t[:0].double() for t in (key, value)]
    prompts = zip(*(t.double().split(list(lengths)) for t in (query, key, value)), strict=True)
    whole = [(q, torch.cat((first[0], k)), torch.cat((first[1], v))) for q, k, v in prompts]
    return torch.cat([causal_softmax(*prompt, **vars(scoring)) for prompt in whole])


def random_inputs(
    num_tokens: int, prefix_tokens: int, heads: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    """Returns views of one tensor, as a fused projection does."""
    num_heads, num_groups = heads
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(prefix_tokens + num_tokens, num_heads + 2 * num_groups, HEAD_SIZE, generator=generator)
    query, key, value = (2 * projected).to(dtype).split([num_heads, num_groups, num_groups], 1)
    prefix = (key[:prefix_tokens], value[:prefix_tokens]) if prefix_tokens else None
    return query[prefix_tokens:], key[prefix_tokens:], value[prefix_tokens:], prefix


def kernel_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    max_query: int,
    max_key: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    scale: float | None = None,
) -> Tensor:
    """Computes what torch.nn.attention.varlen.varlen_attn does: causal, with queries and keys aligned at the end."""
    assert window_size[1] == 0
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    assert enable_gqa
    assert query_ends.dtype == key_ends.dtype == torch.int32
    own, seen = query_ends.diff().tolist(), key_ends.diff().tolist()
    assert (max(own), max(seen)) == (max_query, max_key)
    assert (sum(own), sum(seen)) == (len(query), len(key)) == (query_ends[-1], key_ends[-1])
    rows = zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True)
    return torch.cat([causal_softmax(query[a:b], key[c:d], value[c:d], scale, window) for (a, b), (c, d) in rows])


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel_by_definition)


def attended(kind: Any, inputs: Inputs, lengths: Sequence[int], scoring: Scoring = PLAIN) -> Tensor:
    query, key, value, prefix = inputs
    attend: Attention = kind(lengths, len(prefix[0]) if prefix else 0, CPU, scoring)
    result = attend(query, key, value, prefix)
    assert (result.shape, result.dtype) == ((*query.shape[:2], value.shape[-1]), query.dtype)
    return result


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("prefix_tokens", PREFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_causal_softmax_of_each_prompt(kind: Any, prefix_tokens: int, heads: tuple[int, int]) -> None:
    for lengths in LENGTHS:
        inputs = random_inputs(sum(lengths), prefix_tokens, heads)
        torch.testing.assert_close(
            attended(kind, inputs, lengths).double(), expected(inputs, lengths), rtol=1e-5, atol=2e-5, msg=str(lengths)
        )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    prefix_tokens=st.integers(0, 130),
    heads=st.sampled_from(HEADS),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_equals_causal_softmax_for_any_lengths(
    kind: Any, lengths: list[int], prefix_tokens: int, heads: tuple[int, int], seed: int
) -> None:
    inputs = random_inputs(sum(lengths), prefix_tokens, heads, seed=seed)
    torch.testing.assert_close(
        attended(kind, inputs, lengths).double(), expected(inputs, lengths), rtol=1e-5, atol=2e-5
    )


@example([98], 130, (6, 2), None, None, 0.9375, False, 916)  # large scores
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    prefix_tokens=st.integers(0, 130),
    heads=st.sampled_from(HEADS),
    window=st.none() | st.integers(1, 500),
    softcap=st.none() | st.floats(1, 50),
    scale=st.none() | st.floats(0.05, 1),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_soft_caps_scales_and_sinks_equal_the_reference(
    lengths: list[int],
    prefix_tokens: int,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scale: float | None,
    has_sinks: bool,
    seed: int,
) -> None:
    inputs = random_inputs(sum(lengths), prefix_tokens, heads, seed=seed)
    sinks = torch.linspace(-2, 2, heads[0]) if has_sinks else None
    scoring = Scoring(scale, window, softcap, sinks)

    def chosen(lengths: Sequence[int], prefix_tokens: int, device: torch.device, scoring: Scoring) -> Attention:
        return attention_for(lengths, prefix_tokens, device, torch.float32, scoring)

    # Scores are rounded in proportion to their size, and so is what the softmax makes of them.
    atol = 2e-5 * max(1.0, (scale or 0.0) * HEAD_SIZE**0.5)
    for kind in (chosen, ScoredAttention, *[VarlenAttention] * (softcap is None and not has_sinks)):
        result = attended(kind, inputs, lengths, scoring).double()
        torch.testing.assert_close(result, expected(inputs, lengths, scoring), rtol=1e-5, atol=atol)


def test_values_may_be_of_another_size_than_keys() -> None:
    query, key, value, prefix = random_inputs(100, 20, (6, 2))
    assert prefix is not None
    inputs = (query, key, value[..., :5], (prefix[0], prefix[1][..., :5]))
    for kind in (TiledAttention, PaddedAttention, ScoredAttention):
        result = attended(kind, inputs, [30, 70]).double()
        torch.testing.assert_close(result, expected(inputs, [30, 70]), rtol=1e-5, atol=2e-5)


def test_a_window_that_no_prompt_fills_uses_the_fast_implementation() -> None:
    assert type(attention_for([30, 40], 20, CPU, torch.float32, Scoring(window=60))) is TiledAttention
    assert type(attention_for([30, 40], 20, CPU, torch.float32, Scoring(window=59))) is ScoredAttention


@pytest.mark.parametrize("kind", [TiledAttention, PaddedAttention])
@pytest.mark.parametrize("prefix_tokens", [0, 100])
def test_bfloat16_rounds_scores_and_results_only(kind: Any, prefix_tokens: int) -> None:
    """Tiles also round their scores, like transformers' eager attention. Scores reach 16 here.

    Measured relative L2 error: tiles 0.9 %, SDPA 0.2 %.
    """
    for lengths in LENGTHS[1:]:
        inputs = random_inputs(sum(lengths), prefix_tokens, (6, 2), torch.bfloat16)
        right = expected(inputs, lengths)
        error = (attended(kind, inputs, lengths).double() - right).norm() / right.norm()
        assert error < (0.015 if kind is TiledAttention else 0.004), lengths


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_pack_do_not_affect_each_other(kind: Any) -> None:
    """Not even NaN values do."""
    query, key, value, prefix = random_inputs(100, 20, (6, 2))
    clean = attended(kind, (query, key, value, prefix), [30, 50, 20])
    query, key, value = (torch.cat((t[:30], torch.full_like(t[30:80], torch.nan), t[80:])) for t in (query, key, value))
    dirty = attended(kind, (query, key, value, prefix), [30, 50, 20])
    for rows in (slice(0, 30), slice(80, 100)):
        torch.testing.assert_close(dirty[rows], clean[rows], rtol=0, atol=0)


@pytest.mark.parametrize(("amx", "kind"), [(True, PaddedAttention), (False, TiledAttention)])
def test_tiles_are_used_on_the_cpu_and_padding_elsewhere(
    amx: bool, kind: type[Attention], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    assert type(attention_for([3], 0, CPU, torch.bfloat16)) is kind
    assert type(attention_for([3], 0, CPU, torch.float32)) is TiledAttention
    assert type(attention_for([3], 0, torch.device("meta"), torch.bfloat16)) is PaddedAttention


@pytest.mark.parametrize("kind", [TiledAttention, *[PaddedAttention] * has_amx()])
@pytest.mark.parametrize("shared_tokens", [1, 24, 64, 100])
def test_tiles_give_the_same_bits_alone_in_a_pack_and_after_a_prefix(kind: Any, shared_tokens: int) -> None:
    """In bfloat16, a different summation order would show. P(correct) must not depend on other prompts."""
    heads, lengths = (6, 2), [200, 65, 130]
    query, key, value, prefix = random_inputs(sum(lengths), shared_tokens, heads, torch.bfloat16)
    assert prefix is not None
    continued = kind(lengths, shared_tokens, CPU)(query, key, value, prefix)
    for start, end in pairwise([0, 200, 265, 395]):
        own = slice(start, end)
        alone = kind([end - start], shared_tokens, CPU)(query[own], key[own], value[own], prefix)
        assert torch.equal(continued[own], alone)
        # The prefix as part of the prompt: its queries do not affect later ones.
        whole = [torch.cat((first, t[own])) for first, t in zip(prefix, (key, value), strict=True)]
        queries = torch.cat((torch.zeros_like(query[:shared_tokens]), query[own]))
        unshared = kind([len(queries)], 0, CPU)(queries, *whole, None)
        assert torch.equal(continued[own], unshared[shared_tokens:])
