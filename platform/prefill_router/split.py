"""Train, validation and test, split by prompt: a hash of the prompt_id decides, so any shard can be split alone."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from prefill_router.config import Fraction, StrictModel
from prefill_router.corpus import prompt_hash

_SCALE = float(2**64)


class Part(IntEnum):
    TRAIN = 0
    VALIDATION = 1
    TEST = 2


class Split(StrictModel):
    """`validation_fraction` is a share of the prompts that are not in the test part."""

    seed: int = 0
    test_fraction: Fraction = 0.2
    validation_fraction: Fraction = 0.15

    def parts(self, prompt_ids: Iterable[str]) -> NDArray[np.int8]:
        """The Part of each prompt."""
        draws = np.array([prompt_hash(f"{self.seed}:{prompt_id}") for prompt_id in prompt_ids], np.uint64) / _SCALE
        rest = (draws - self.test_fraction) / (1.0 - self.test_fraction)
        parts = np.where(rest < self.validation_fraction, Part.VALIDATION, Part.TRAIN)
        return np.where(draws < self.test_fraction, Part.TEST, parts).astype(np.int8)


def prompt_hashes(prompt_ids: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([prompt_hash(prompt_id) for prompt_id in prompt_ids], np.uint64)
