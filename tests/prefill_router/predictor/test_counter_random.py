from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prefill_router.predictor.counter_random import fold, keep_mask, mixed, seed_keys, uniform


def keys(num: int, seed: int = 0) -> Tensor:
    return fold(seed_keys([seed])[0], torch.arange(num))


def test_the_mixer_is_that_of_the_source() -> None:
    def plain(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    values = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 123456789]
    signed = torch.from_numpy(np.array(values, np.uint32).view(np.int32).copy())
    assert (mixed(signed).numpy().view(np.uint32) == [plain(value) for value in values]).all()


def test_keys_differ_by_parent_and_counter() -> None:
    assert len(keys(100_000).unique()) > 99_990  # about one collision is expected among 2^32 values
    assert not torch.equal(keys(10, seed=0), keys(10, seed=1))
    assert torch.equal(fold(keys(3), 7), fold(keys(3), torch.tensor(7)))


def test_neighbouring_counters_are_unrelated() -> None:
    u = uniform(keys(100_000)).numpy()
    assert np.corrcoef(u[:-1], u[1:])[0, 1] == pytest.approx(0.0, abs=0.01)
    assert (np.bincount((u * 20).astype(int)) / len(u)) == pytest.approx(np.full(20, 0.05), abs=0.004)
    assert ((u >= 0) & (u < 1)).all()


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("width", [1, 6, 256])
def test_masks_leave_out_their_rate_of_every_unit_and_row(rate: float, width: int) -> None:
    kept = keep_mask(keys(4000), width, rate).float()
    assert kept.shape == (4000, width)
    np.testing.assert_allclose(1 - kept.mean(0), rate, atol=0.04)
    assert 1 - kept.mean().item() == pytest.approx(rate, abs=0.01)


def test_units_of_a_mask_are_unrelated() -> None:
    kept = keep_mask(keys(20_000), 16, 0.5).numpy().astype(float)
    correlation = np.corrcoef(kept.T) - np.eye(16)
    assert np.abs(correlation).max() < 0.04


def test_a_row_has_its_mask_wherever_it_stands() -> None:
    some = keys(20).view(4, 5)
    assert torch.equal(keep_mask(some, 9, 0.3)[2, 3], keep_mask(some[2, 3], 9, 0.3))
