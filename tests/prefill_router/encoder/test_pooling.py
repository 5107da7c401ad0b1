"""Pooling is compared with numpy in float64, one prompt at a time."""

# T tokens of a pack, P of a prefix, D hidden size, B prompts, C columns

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from prefill_router.common.schema import ActivationColumn, activation_columns
from prefill_router.encoder.pooling import FLOAT16_MAX, Pooler, PrefixSums

CPU = torch.device("cpu")
D = 48
LAST, MEAN = ActivationColumn("last", 0), ActivationColumn("mean", 0)
DTYPES = [torch.float32, torch.bfloat16]


def random_states(num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pooled(
    states_TD: Tensor, lengths: list[int], leave_out_first: bool, prefix: PrefixSums | None = None
) -> NDArray[np.float16]:
    """Returns the last and mean pooling, (2, B, D)."""
    pooler = Pooler([LAST, MEAN], lengths, CPU, leave_out_first, prefix)
    pooler.visit(0, states_TD)
    result = pooler.result()
    assert (result.dtype, result.shape) == (torch.float16, (2, len(lengths), D))
    return result.numpy()


def assert_pooled(values: NDArray[np.float16], prompts: list[NDArray[np.float64]], leave_out_first: bool) -> None:
    """Compares within the rounding of float16 and float32."""
    for row, states in enumerate(prompts):
        first = int(leave_out_first and len(states) > 1)
        np.testing.assert_allclose(values[0, row], states[-1], rtol=2**-11, atol=1e-7)
        np.testing.assert_allclose(values[1, row], states[first:].mean(0), rtol=2**-11, atol=1e-6)


def by_prompt(states_TD: Tensor, lengths: list[int]) -> list[NDArray[np.float64]]:
    return np.split(states_TD.double().numpy(), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leave_out_first", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [300], [1, 5, 2, 1, 300, 3], [4, 4, 4]])
def test_last_and_mean_of_each_prompt(lengths: list[int], leave_out_first: bool, dtype: torch.dtype) -> None:
    states_TD = random_states(sum(lengths), dtype)
    assert_pooled(pooled(states_TD, lengths, leave_out_first), by_prompt(states_TD, lengths), leave_out_first)


def test_a_one_token_prompt_keeps_its_token() -> None:
    states_TD = random_states(3)
    values = pooled(states_TD, [1, 2], leave_out_first=True)
    np.testing.assert_array_equal(values[1], states_TD[[0, 2]].half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leave_out_first", [False, True])
@pytest.mark.parametrize("prefix_tokens", [1, 2, 200])
def test_after_a_prefix_the_mean_includes_the_prefix(
    prefix_tokens: int, leave_out_first: bool, dtype: torch.dtype
) -> None:
    lengths = [1, 5, 2, 100]
    shared, states_TD = random_states(prefix_tokens, dtype, seed=1), random_states(sum(lengths), dtype)
    sums = PrefixSums(prefix_tokens, leave_out_first)
    sums.visit(0, shared)
    whole = [np.concatenate((shared.double().numpy(), own)) for own in by_prompt(states_TD, lengths)]
    assert_pooled(pooled(states_TD, lengths, leave_out_first, sums), whole, leave_out_first)


def test_each_layer_has_its_own_prefix_and_columns() -> None:
    """Columns keep their order, whatever the order of layers."""
    columns = activation_columns([2, 0], ["mean", "last"])
    sums, pooler = PrefixSums(4, False), None
    shared, own = ([random_states(4, seed=i) for i in range(3)], [random_states(3, seed=9 - i) for i in range(3)])
    for layer, states in enumerate(shared):
        sums.visit(layer, states)
    pooler = Pooler(columns, [3], CPU, False, sums)
    for layer, states in enumerate(own):
        pooler.visit(layer, states)
    expected = [
        (own[c.layer][-1] if c.pooling == "last" else torch.cat((shared[c.layer], own[c.layer])).mean(0))
        for c in columns
    ]
    assert [c.name for c in columns] == ["mean_000", "mean_002", "last_000", "last_002"]
    torch.testing.assert_close(pooler.result()[:, 0].float(), torch.stack(expected), rtol=2**-11, atol=1e-6)


def test_values_are_clamped_to_the_range_of_float16() -> None:
    states_TD = torch.tensor([[1e6, -1e6, 65504.0, 65519.0, 3e38, torch.inf, -torch.inf, 1.0]])
    pooler = Pooler([LAST, MEAN], [1], CPU, False)
    pooler.visit(0, states_TD)
    largest = FLOAT16_MAX
    expected = [largest, -largest, largest, largest, largest, largest, -largest, 1.0]
    assert pooler.result().tolist() == [[expected], [expected]]


def test_the_mean_of_large_values_does_not_overflow() -> None:
    """The sum of 1,000 values of 60,000 exceeds float16, their mean does not."""
    states_TD = torch.full((1000, D), 60000.0)
    np.testing.assert_array_equal(pooled(states_TD, [1000], False)[1], np.full((1, D), 60000.0, np.float16))


@settings(max_examples=60, deadline=None)
@given(
    own=st.integers(1, 80),
    before=st.lists(st.integers(1, 60), max_size=4),
    after=st.lists(st.integers(1, 60), max_size=4),
    leave_out_first=st.booleans(),
    with_prefix=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_other_prompts_do_not_change_a_bit(
    own: int, before: list[int], after: list[int], leave_out_first: bool, with_prefix: bool, dtype: torch.dtype
) -> None:
    sums = None
    if with_prefix:
        sums = PrefixSums(7, leave_out_first)
        sums.visit(0, random_states(7, dtype, seed=1))
    mine = random_states(own, dtype, seed=2)
    pack = torch.cat((random_states(sum(before), dtype, seed=3), mine, random_states(sum(after), dtype, seed=4)))
    together = pooled(pack, [*before, own, *after], leave_out_first, sums)[:, len(before)]
    np.testing.assert_array_equal(together, pooled(mine, [own], leave_out_first, sums)[:, 0])
