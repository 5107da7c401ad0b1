"""Train, validation and test, split by prompt: a hash of the prompt_id decides, so any shard can be split alone."""

# N prompts

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from prefill_router.config import Fraction, StrictModel
from prefill_router.corpus import prompt_hash

Keys = NDArray[np.uint64]  # (N,) hashes of prompt_ids


def prompt_hashes(prompt_ids: Iterable[str]) -> Keys:
    return np.array([prompt_hash(prompt_id) for prompt_id in prompt_ids], np.uint64)


class Part(IntEnum):
    TRAIN = 0
    VALIDATION = 1
    TEST = 2


class Split(StrictModel):
    """`validation_fraction` is a share of the prompts that are not in the test part."""

    seed: int = 0
    test_fraction: Fraction = 0.2
    validation_fraction: Fraction = 0.15

    def describe(self) -> str:
        return (
            f"by prompt, seed {self.seed}: {self.test_fraction:.0%} held out; of the rest, "
            f"{self.validation_fraction:.0%} to choose calibration and tolerance on"
        )

    def parts(self, keys: Keys) -> NDArray[np.int8]:
        """The Part of each prompt (N,), by its hash."""
        draws = mixed(keys ^ mixed(np.array([self.seed], np.uint64))) / float(2**64)
        rest = (draws - self.test_fraction) / (1.0 - self.test_fraction)
        parts = np.where(rest < self.validation_fraction, Part.VALIDATION, Part.TRAIN)
        return np.where(draws < self.test_fraction, Part.TEST, parts).astype(np.int8)


def mixed(x: Keys) -> Keys:
    """Hashes of hashes: the mixer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
