"""Random numbers by counter: a hash of what a number is for, and not of when or where it is drawn.

So a row meets the same order and the same dropout on one worker or many, on a CPU or a GPU, with its seed trained alone
or beside others, and after a restart. The hash is the 32-bit mixer `lowbias32` of C. Wellons' hash prospector, chosen
there for its low bias; its constants are facts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 divided by the golden ratio: spreads consecutive counters
_FIRST, _SECOND = 0x21F0AAAD, 0xD35A2D97 - 2**32


def mixed(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the argument changes every bit of the result half of the time."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _SECOND
    return x ^ ((x >> 15) & 0x1FFFF)


def fold(key: Tensor, part: Tensor | int) -> Tensor:
    """The int32 keys of `part` (a counter) below `key`; both broadcast."""
    if isinstance(part, int):
        part = torch.tensor(part, dtype=torch.int64, device=key.device)
    return mixed(mixed(key + part.to(torch.int32) * _GOLDEN) + _GOLDEN)


def seed_keys(seeds: list[int], device: torch.device | str = "cpu") -> Tensor:
    """An int32 key (K,) for each seed."""
    return fold(torch.zeros((), dtype=torch.int32, device=device), torch.tensor(seeds, device=device))


def keep_mask(keys: Tensor, width: int, rate: float) -> Tensor:
    """Dropout masks (..., width), bool: False in `rate` of the places, to the nearest 1/256.

    Four bytes of one hash serve four units.
    """
    counters = torch.arange((width + 3) // 4, dtype=torch.int32, device=keys.device) * _GOLDEN
    words = mixed(keys[..., None] + counters)
    return words.view(torch.uint8)[..., :width] >= round(256 * rate)


def uniform(keys: Tensor) -> Tensor:
    """float64 in [0, 1) of int32 keys."""
    return (keys.to(torch.float64) + 2.0**31) / 2.0**32
