from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.corpus.split import Part, Split, prompt_hashes

IDS = [f"prompt-{i}" for i in range(20_000)]
KEYS = prompt_hashes(IDS)


def share(split: Split, part: Part) -> float:
    return float((split.parts(KEYS) == part).mean())


@pytest.mark.parametrize(("test", "validation"), [(0.2, 0.15), (0.5, 0.5), (0.0, 0.15), (0.3, 0.0)])
def test_parts_have_the_shares_that_were_asked_for(test: float, validation: float) -> None:
    split = Split(test_fraction=test, validation_fraction=validation)
    assert share(split, Part.TEST) == pytest.approx(test, abs=0.015)
    assert share(split, Part.VALIDATION) == pytest.approx((1 - test) * validation, abs=0.015)


def test_parts_are_those_of_a_hash_of_seed_and_prompt() -> None:
    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def part(prompt_id: str) -> Part:
        key = int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")
        draw = mixed(key ^ mixed(7)) / 2**64
        if draw < 0.2:
            return Part.TEST
        return Part.VALIDATION if (draw - 0.2) / 0.8 < 0.15 else Part.TRAIN

    assert Split(seed=7).parts(KEYS[:500]).tolist() == [part(prompt_id) for prompt_id in IDS[:500]]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(0, 100), st.data())
def test_a_shard_is_split_as_it_would_be_in_the_whole(ids: list[str], seed: int, data: st.DataObject) -> None:
    split = Split(seed=seed)
    whole = dict(zip(ids, split.parts(prompt_hashes(ids)), strict=True))
    shard = data.draw(st.lists(st.sampled_from(ids))) if ids else []
    assert split.parts(prompt_hashes(shard)).tolist() == [whole[prompt_id] for prompt_id in shard]


def test_a_larger_test_part_takes_prompts_and_gives_none_back() -> None:
    small, large = (Split(test_fraction=f).parts(KEYS) == Part.TEST for f in (0.2, 0.3))
    assert small.sum() < large.sum()
    assert large[small].all()


def test_another_seed_is_another_split() -> None:
    first, second = (Split(seed=seed).parts(KEYS) == Part.TEST for seed in (0, 1))
    assert (first & second).mean() == pytest.approx(0.2 * 0.2, abs=0.01)


def test_no_prompts_have_no_parts() -> None:
    assert Split().parts(prompt_hashes([])).shape == (0,)


def test_hashes_tell_prompts_apart() -> None:
    hashes = prompt_hashes(IDS)
    assert hashes.dtype == np.uint64
    assert len(np.unique(hashes)) == len(IDS)
    assert prompt_hashes(IDS[5:6])[0] == hashes[5]
