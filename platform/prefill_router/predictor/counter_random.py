"""Counter-based random numbers: each number is a hash of its purpose, not of when or where it is drawn.

A row therefore has the same order and the same dropout with any number of workers, on a CPU or a GPU, with its seed
trained alone or with others, and after a restart. The hash is the low-bias 32-bit mixer `lowbias32` of C. Wellons'
hash prospector.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 divided by the golden ratio; spreads consecutive counters
_FIRST, _SECOND = 0x21F0AAAD, 0xD35A2D97 - 2**32


def mixed(x: Tensor) -> Tensor:
    """Hashes int32 bijectively: flipping any input bit flips each output bit with probability one half."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _SECOND
    return x ^ ((x >> 15) & 0x1FFFF)


def fold(key: Tensor, part: Tensor | int) -> Tensor:
    """Derives int32 keys from parent keys `key` and counters `part`; both broadcast."""
    if isinstance(part, int):
        part = torch.tensor(part, dtype=torch.int64, device=key.device)
    return mixed(mixed(key + part.to(torch.int32) * _GOLDEN) + _GOLDEN)


def seed_keys(seeds: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Returns an int32 key (K,) for each seed."""
    return fold(torch.zeros((), dtype=torch.int32, device=device), torch.tensor(seeds, device=device))


def keep_mask(keys: Tensor, width: int, rate: float) -> Tensor:
    """Returns dropout masks (..., width), bool, False with probability `rate`, rounded to 1/256.

    The four bytes of one hash serve four units.
    """
    counters = torch.arange((width + 3) // 4, dtype=torch.int32, device=keys.device) * _GOLDEN
    words = mixed(keys[..., None] + counters)
    return words.view(torch.uint8)[..., :width] >= round(256 * rate)


def uniform(keys: Tensor) -> Tensor:
    """Maps int32 keys to float64 in [0, 1)."""
    return (keys.to(torch.float64) + 2.0**31) / 2.0**32
