from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import write, write_jsonl
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import Part, Split, prompt_hashes
from prefill_router.corpus.split_groups import SplitGroups, of_corpus, text_hash


@pytest.mark.parametrize(
    "other",
    [
        "what is 2 + 2",
        "WHAT IS 2+2?",
        "  What\tis…\n2 — 2 !",
        "What is \uff12 + 2?",
        [{"role": "user", "content": "What is 2+2?"}],
    ],
)
def test_case_space_and_punctuation_make_no_difference(other: str) -> None:
    assert text_hash(other) == text_hash("What is 2 + 2?")


@pytest.mark.parametrize("other", ["What is 2 + 3?", "What is 22?", "Is what 2 2", ""])
def test_different_words_make_a_difference(other: str) -> None:
    assert text_hash(other) != text_hash("What is 2 + 2?")


def test_prompts_without_words_are_distinguished() -> None:
    assert len({text_hash(text) for text in ("???", "!!!", "+ + +")}) == 3


CORPUS = [
    {"prompt_id": "a", "prompt": "What is 2 + 2?", "category": "math"},
    {"prompt_id": "b", "prompt": "what is 2 + 2", "category": "history"},
    {"prompt_id": "c", "prompt": "Who was Nero?", "category": "history"},
    {"prompt_id": "d", "prompt": "What is a tort?", "category": "law"},
]


def parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(CORPUS), path)
    return str(path)


def jsonl(path: Path) -> str:
    return str(write_jsonl(path, *CORPUS))


def csv(path: Path) -> str:
    lines = [",".join(f'"{value}"' for value in row.values()) for row in CORPUS]
    return str(write(path, "\n".join(["prompt_id,prompt,category", *lines])))


@pytest.mark.parametrize(("write_to", "suffix"), [(parquet, "parquet"), (jsonl, "jsonl"), (csv, "csv")])
def test_a_category_is_held_out_with_all_its_repeats(
    write_to: Callable[[Path], str], suffix: str, tmp_path: Path
) -> None:
    corpus = write_to(tmp_path / f"corpus.{suffix}")
    keys = prompt_hashes("abcd")
    by_text = of_corpus(corpus)
    assert by_text.of(keys)[0] == by_text.of(keys)[1]
    assert len(set(by_text.of(keys).tolist())) == 3
    assert not by_text.held_out(keys).any()
    assert of_corpus(corpus, ["history"]).held_out(keys).tolist() == [True, True, True, False]
    assert of_corpus(corpus, ["law"]).held_out(keys).tolist() == [False, False, False, True]


def test_a_missing_category_or_column_is_an_error(tmp_path: Path) -> None:
    corpus = parquet(tmp_path / "corpus.parquet")
    with pytest.raises(UserError, match='no prompt has category "biology"; it has history, law, math'):
        of_corpus(corpus, ["biology"])
    with pytest.raises(UserError, match="column topic is missing"):
        of_corpus(corpus, ["law"], "topic")
    with pytest.raises(UserError, match="no such corpus"):
        of_corpus(str(tmp_path / "nowhere.parquet"))


def test_an_unknown_prompt_is_a_group_of_its_own() -> None:
    keys = np.array([3, 5], np.uint64)
    groups = SplitGroups("text", keys, np.array([7, 7], np.uint64), np.array([True, False]))
    assert groups.of(np.array([5, 9, 3], np.uint64)).tolist() == [7, 9, 7]
    assert groups.held_out(np.array([5, 9, 3], np.uint64)).tolist() == [False, False, True]
    nothing = SplitGroups("content", keys[:0], keys[:0])
    assert nothing.of(keys).tolist() == [3, 5]
    assert nothing.held_out(keys).tolist() == [False, False]


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(2, 25), st.sampled_from([0.5, 0.8, 0.95]))
def test_a_chain_of_similar_prompts_is_one_group(seed: int, num_prompts: int, likeness: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_prompts, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = rng.permutation(1000)[:num_prompts].astype(np.uint64)
    own = rng.integers(0, num_prompts, num_prompts).astype(np.uint64)
    order = np.argsort(keys)
    joined = SplitGroups("text", keys[order], own[order]).joined_where_similar(keys, vectors, likeness).of(keys)

    reached = (vectors @ vectors.T >= likeness) | (own[:, None] == own)
    for _ in range(num_prompts):
        reached = reached @ reached
    np.testing.assert_array_equal(joined[:, None] == joined, reached)


def test_groups_are_on_one_side_and_folds_cover_all_prompts() -> None:
    groups = prompt_hashes([f"unit-{i}" for i in range(3000)])
    parts = np.stack([Split(folds=5, fold=fold, test_fraction=0.2).parts(groups) == Part.TEST for fold in range(5)])
    assert (parts.sum(0) == 1).all()
    assert parts.mean(1) == pytest.approx([0.2] * 5, abs=0.03)
    twice = np.repeat(groups, 2)
    sides = Split().parts(twice).reshape(-1, 2)
    np.testing.assert_array_equal(sides[:, 0], sides[:, 1])


def test_prompts_that_are_all_alike_do_not_take_the_memory_of_all_pairs() -> None:
    keys = prompt_hashes([f"p{i}" for i in range(6000)])
    vectors = np.ones((6000, 1), np.float32)
    tracemalloc.start()
    groups = SplitGroups("text", keys, keys).joined_where_similar(keys, vectors, 0.9).of(keys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(groups)) == 1
    assert peak < 150e6  # all pairs take 1.1 GB
