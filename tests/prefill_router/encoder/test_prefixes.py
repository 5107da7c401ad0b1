"""Groups are compared with a brute-force search, and activations after shared prefixes with those of single prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.encoder import prefill_encoder as encoder_module
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefixes import PrefixGroup, shared_prefixes
from reference import assert_equals_transformers, relative_error
from tiny import WORDS

# A small, skewed vocabulary, so that prompts share prefixes of many lengths.
TOKENS = st.sampled_from([0, 0, 0, 1])
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=12)


def common_tokens(prompts: Sequence[list[int]]) -> int:
    """Returns the length of the common prefix of all prompts that leaves each a token of its own."""
    num_tokens = 0
    while all(len(p) > num_tokens + 1 for p in prompts) and len({p[num_tokens] for p in prompts}) == 1:
        num_tokens += 1
    return num_tokens


def saved_tokens(groups: Sequence[PrefixGroup]) -> int:
    return sum((len(group.prompts) - 1) * group.num_tokens for group in groups)


def groupings(prompts: list[list[int]]) -> Iterator[list[list[list[int]]]]:
    """Yields all partitions of the prompts into groups."""
    if not prompts:
        yield []
        return
    first, *others = prompts
    for grouping in groupings(others):
        yield [[first], *grouping]
        for i, group in enumerate(grouping):
            yield [*grouping[:i], [first, *group], *grouping[i + 1 :]]


# --- groups ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(prompts=PROMPTS, min_saved=st.integers(0, 12))
def test_groups_cover_every_prompt_once_and_share_their_prefix(prompts: list[list[int]], min_saved: int) -> None:
    groups = shared_prefixes(prompts, min_saved)
    assert sorted(i for group in groups for i in group.prompts) == list(range(len(prompts)))
    for group in groups:
        members = [prompts[i] for i in group.prompts]
        assert group.num_tokens <= common_tokens(members)
        assert not group.num_tokens or (len(members) - 1) * group.num_tokens >= min_saved
    assert sum(group.num_tokens == 0 for group in groups) <= 1


@settings(max_examples=300, deadline=None)
@given(prompts=PROMPTS, min_saved=st.integers(1, 12))
def test_groups_save_at_least_as_much_as_the_common_prefix(prompts: list[list[int]], min_saved: int) -> None:
    by_common = (len(prompts) - 1) * common_tokens(prompts)
    if by_common >= min_saved:
        assert saved_tokens(shared_prefixes(prompts, min_saved)) >= by_common


@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=6), min_saved=st.integers(1, 8))
def test_no_grouping_saves_more(prompts: list[list[int]], min_saved: int) -> None:
    """Compares savings, less the cost of each group, over all possible partitions."""

    def saved(grouping: list[list[list[int]]]) -> int:
        return sum(max(0, (len(group) - 1) * common_tokens(group) - min_saved) for group in grouping)

    groups = shared_prefixes(prompts, min_saved)
    num_sharing = sum(group.num_tokens > 0 for group in groups)
    assert saved_tokens(groups) - num_sharing * min_saved == max(map(saved, groupings(prompts)))


def test_no_prompts_have_no_groups() -> None:
    assert shared_prefixes([], 10) == []


def test_prompts_that_share_little_are_one_group_without_a_prefix() -> None:
    prompts = [[7, i, i + 1, i + 2] for i in range(10)]
    assert shared_prefixes(prompts, 10) == [PrefixGroup(0, list(range(10)))]
    assert shared_prefixes(prompts, 9) == [PrefixGroup(1, list(range(10)))]


def test_the_same_prompt_again_keeps_its_last_token() -> None:
    assert shared_prefixes([[1, 2, 3, 4]] * 5, 4) == [PrefixGroup(3, [0, 1, 2, 3, 4])]


def random_prompts(num_prompts: int, num_tokens: int, opening: Sequence[int] = (), seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*opening, *rng.integers(100, 50_000, num_tokens).tolist()] for _ in range(num_prompts)]


def test_prompts_with_a_common_system_text_are_a_group() -> None:
    """20 of 100 prompts share 200 tokens; all begin with three template tokens."""
    rng = np.random.default_rng(0)
    with_system = random_prompts(20, 50, [1, 2, 3, *range(1000, 1197)])
    prompts = [*with_system, *random_prompts(80, 50, [1, 2, 3], seed=1)]
    order = rng.permutation(100)
    groups = shared_prefixes([prompts[i] for i in order], 256)
    by_tokens = {group.num_tokens: {order[i] for i in group.prompts} for group in groups}
    # For the other prompts, the template would save only 3 * 79 tokens, less than 256.
    assert by_tokens == {200: set(range(20)), 0: set(range(20, 100))}


def test_a_longer_prefix_within_a_shorter_one_is_a_separate_group() -> None:
    system, instructions = list(range(1000, 1100)), list(range(2000, 2300))
    prompts = [*random_prompts(30, 20, system), *random_prompts(30, 20, system + instructions, seed=1)]
    groups = {group.num_tokens: sorted(group.prompts) for group in shared_prefixes(prompts, 256)}
    assert groups == {100: list(range(30)), 400: list(range(30, 60))}


def test_conversations_share_their_turns() -> None:
    """Ten conversations of eight turns after a system text of 50 tokens; each turn extends the previous one by 100.

    The last five turns of a conversation share 449 tokens, all of the fourth turn but its last token; the others share
    the system text. By hand: splitting at no other turn saves more than 4 * 449 - 5 * 50.
    """
    system = list(range(50))
    talks = [system + random_prompts(1, 800, seed=talk)[0] for talk in range(10)]
    prompts = [talk[: 50 + 100 * turn] for talk in talks for turn in range(1, 9)]
    groups = {(group.num_tokens, tuple(sorted(group.prompts))) for group in shared_prefixes(prompts, 256)}
    later = {(449, tuple(range(8 * talk + 3, 8 * talk + 8))) for talk in range(10)}
    assert groups == later | {(50, tuple(i for i in range(80) if i % 8 < 3))}


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param([], id="nothing shared"),
        pytest.param([7] * 150, id="150 tokens"),
        pytest.param([7] * 195, id="195"),
    ],
)
def test_grouping_many_prompts_is_fast(opening: list[int]) -> None:
    """8,192 prompts of 200 tokens take 0.04 to 0.4 s of thread time, which other processes do not affect."""
    prompts = random_prompts(8192, 200 - len(opening), opening)
    started = time.thread_time()
    shared_prefixes(prompts, 256)
    assert time.thread_time() - started < 5


def test_a_long_chain_of_prompts_that_extend_each_other_is_grouped() -> None:
    groups = shared_prefixes([list(range(n)) for n in range(1, 2001)], 256)
    assert sorted(i for group in groups for i in group.prompts) == list(range(2000))


# --- activations after shared prefixes ---------------------------------------------------------------------------


def words(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words))


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations() -> list[Any]:
    """Twelve prompts share a system text, six of them a longer one, three of which are continued; six have none."""
    rng = np.random.default_rng(0)
    system, more = words(rng, 60), words(rng, 80)
    common = [[message("system", system), message("user", words(rng, n))] for n in (1, 3, 8, 20, 2, 5)]
    longer = [[message("system", f"{system} {more}"), message("user", words(rng, n))] for n in (4, 1, 9, 2, 7, 30)]
    continued = [[*m, message("assistant", words(rng, 5)), message("user", "one two")] for m in longer[:3]]
    bare = [words(rng, n) for n in (1, 2, 5, 9, 30, 60)]
    return [prompt for prompts in (common, longer, continued, bare) for prompt in prompts]


def load(folder: Path, **options: Any) -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec(**{"model": str(folder), "dtype": "float32", **options}), device="cpu")


@pytest.fixture
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes packs small, so that few prompts are worth a shared prefix and a group fills several packs."""
    monkeypatch.setitem(encoder_module.BUDGET_TOKENS, "cpu", 64)


@pytest.mark.usefixtures("_small_packs")
@pytest.mark.parametrize(("mean_over", "mean_from"), [("all", 0), ("after_first", 1)])
def test_sharing_changes_no_activation(tiny_model: Path, mean_over: str, mean_from: int) -> None:
    """Activations equal those of the prompt alone, to one rounding of float16, and those of transformers."""
    encoder, prompts = load(tiny_model, mean_over=mean_over), conversations()
    tokens = encoder.tokenize(prompts)
    together, work = encoder.forward(tokens, encoder.columns("all", ["last", "mean"]))
    assert work.computed_tokens < 0.6 * work.tokens
    assert_equals_transformers(tiny_model, tokens.ids, together, mean_from)
    for row, prompt in enumerate(prompts):
        for name, values in encoder.encode([prompt]).items():
            np.testing.assert_allclose(together[name][row], values[0], rtol=2**-10, atol=2e-6, err_msg=f"{name} {row}")


@pytest.mark.usefixtures("_small_packs")
def test_the_saved_tokens_are_those_of_the_groups(tiny_encoder: PrefillEncoder) -> None:
    tokens = tiny_encoder.tokenize(conversations())
    _, work = tiny_encoder.forward(tokens, tiny_encoder.columns([2], ["mean"]))
    assert work.tokens == tokens.num_tokens.sum()
    assert work.tokens - work.computed_tokens == saved_tokens(shared_prefixes(tokens.ids, 16)) > 0


@pytest.mark.usefixtures("_small_packs")
@pytest.mark.parametrize("layers", [[0], [1], [0, 3], [4]])
def test_a_pass_that_ends_early_shares_too(tiny_encoder: PrefillEncoder, layers: list[int]) -> None:
    everything, some = tiny_encoder.encode(conversations()), tiny_encoder.encode(conversations(), layers)
    for name, values in some.items():
        np.testing.assert_array_equal(values, everything[name])


@pytest.mark.usefixtures("_small_packs")
def test_sharing_in_bfloat16_is_as_exact(tiny_model: Path) -> None:
    """Relative L2 error is below 2 % (measured: 1 %), the precision of bfloat16 here."""
    encoder, prompts = load(tiny_model, dtype="bfloat16"), conversations()
    together = encoder.encode(prompts)
    for row, prompt in enumerate(prompts):
        for name, values in encoder.encode([prompt]).items():
            if name != "num_tokens":
                assert relative_error(together[name][row], values[0]) < 0.02, (name, row)


@pytest.mark.usefixtures("_small_packs")
def test_prompts_whose_middle_was_cut_share_their_beginning(tiny_model: Path) -> None:
    encoder = load(tiny_model, max_tokens=40)
    prompts = [" ".join([*WORDS * 3, word]) for word in WORDS]
    tokens = encoder.tokenize(prompts)
    assert tokens.num_truncated == len(prompts)
    encoded, work = encoder.forward(tokens, encoder.columns("all", ["last", "mean"]))
    assert work.computed_tokens < work.tokens / 2
    assert_equals_transformers(tiny_model, tokens.ids, encoded)
