"""A prefix cache leaves activations bit-identical and computes fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from prefill_router.encoder.pooling import PrefixSums
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefix_cache import Prefix, PrefixCache
from prefill_router.encoder.tokenization import Tokens

SYSTEM = "one two three four five six " * 4


def prefix(ids: range, num_blocks: int = 2) -> Prefix:
    return Prefix(tuple(ids), [(torch.zeros(0), torch.zeros(0))] * num_blocks, PrefixSums(len(ids), False))


@pytest.fixture
def encoder(tiny_encoder: PrefillEncoder) -> Iterator[PrefillEncoder]:
    tiny_encoder.prefix_cache = PrefixCache(1000)
    yield tiny_encoder
    tiny_encoder.prefix_cache = None


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, *({"role": "user", "content": turn} for turn in turns)]


def test_a_prefix_is_found_with_the_second_prompt_and_used_from_the_third() -> None:
    cache = PrefixCache(1000)
    shared = list(range(50))
    assert [g.num_tokens for g in cache.groups([[*shared, 100]])] == [0]
    assert [g.num_tokens for g in cache.groups([[*shared, 101], [200, 201]])] == [50, 0]
    cache.add(prefix(range(50)))
    assert [(g.num_tokens, g.prompts) for g in cache.groups([[*shared, 102], [7], [*shared, 103]])] == [
        (50, [0, 2]),
        (0, [1]),
    ]


def test_a_prompt_keeps_a_token_of_its_own() -> None:
    cache = PrefixCache(1000)
    cache.add(prefix(range(30)))
    assert [g.num_tokens for g in cache.groups([list(range(30))])] == [0]


def test_the_least_recently_used_prefix_is_evicted() -> None:
    cache = PrefixCache(100)
    for start in (0, 1000, 2000):
        cache.add(prefix(range(start, start + 50)))
    assert cache.longest(tuple(range(60)), 2) is None
    assert cache.longest(tuple(range(1000, 1060)), 2) is not None
    cache.add(prefix(range(3000, 3050)))
    assert cache.longest(tuple(range(2000, 2060)), 2) is None
    assert cache.num_tokens == 100


def test_a_prefix_of_too_few_blocks_is_not_used() -> None:
    cache = PrefixCache(100)
    cache.add(prefix(range(30), num_blocks=2))
    assert cache.longest(tuple(range(40)), 3) is None


def test_activations_equal_those_without_a_cache(encoder: PrefillEncoder) -> None:
    columns = encoder.columns("all", ("last", "mean"))
    tokens = [encoder.tokenize([conversation(*["name a river"] * turn, "what is two plus six")]) for turn in range(5)]
    remembered = [encoder.forward(t, columns) for t in tokens]
    cache, encoder.prefix_cache = encoder.prefix_cache, None
    for t, (got, work) in zip(tokens, remembered, strict=True):
        expected, whole = encoder.forward(t, columns)
        for name, values in expected.items():
            np.testing.assert_allclose(got[name].astype(float), values.astype(float), rtol=2**-10, atol=2e-6)
        assert work.computed_tokens <= whole.computed_tokens
    # The last turn computes its new tokens and no prefix.
    assert remembered[-1][1].computed_tokens <= 0.5 * whole.computed_tokens
    assert cache is not None
    assert cache.num_tokens > 0


def test_threads_share_a_cache(encoder: PrefillEncoder) -> None:
    columns = encoder.columns([2], ("last",))
    tokens = [encoder.tokenize([conversation(f"what is {n} plus {n % 7}")]) for n in range(60)]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        got = list(pool.map(lambda t: encoder.forward(t, columns)[0]["last_002"][0], tokens))
    encoder.prefix_cache = None
    together = Tokens([t.ids[0] for t in tokens], np.concatenate([t.full_lengths for t in tokens]))
    expected, _ = encoder.forward(together, columns)
    np.testing.assert_allclose(np.stack(got).astype(float), expected["last_002"].astype(float), rtol=2**-9, atol=1e-5)
