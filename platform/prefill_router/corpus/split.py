"""Splits prompts into train, validation and test by a hash, so that each shard can be split on its own.

The hash is that of the prompt's split group (see `split_groups`), so that equal or similar prompts are on one side.
"""

# N prompts

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prefill_router.common.validation import Fraction, StrictModel
from prefill_router.corpus.reader import prompt_hash

PromptHashes = NDArray[np.uint64]  # (N,) hashes of prompt_ids, or split groups


def prompt_hashes(prompt_ids: Iterable[str]) -> PromptHashes:
    return np.array([prompt_hash(prompt_id) for prompt_id in prompt_ids], np.uint64)


class Part(IntEnum):
    TRAIN = 0
    VALIDATION = 1
    TEST = 2


class Split(StrictModel):
    """How to split prompts. `validation_fraction` applies to the prompts outside the test part.

    With `folds`, the test part is fold number `fold` of that many equal ones. With `held_out`, it is the prompts of
    these categories, and `test_fraction` is 0.
    """

    seed: int = 0
    test_fraction: Fraction = 0.2
    validation_fraction: Fraction = 0.15
    folds: int | None = Field(None, ge=2)
    fold: int = Field(0, ge=0)
    held_out: tuple[str, ...] = ()
    units: Literal["content", "text", "similarity"] = "content"  # the kind of split groups: see `split_groups`

    def describe(self) -> str:
        """Describes the split for people."""
        what = f"{self.test_fraction:.0%} of the prompts"
        if self.folds:
            what = f"fold {self.fold + 1} of {self.folds}"
        if self.held_out:
            what = ", ".join(self.held_out)
        return (
            f"{what} held out, {self.validation_fraction:.0%} of the rest for validation, by a hash with seed "
            f"{self.seed}; {_GROUPS[self.units]} on one side"
        )

    def parts(self, keys: PromptHashes) -> NDArray[np.int8]:
        """The Part of each prompt (N,), by its split group."""
        draws = mixed(keys ^ mixed(np.array([self.seed], np.uint64))) / float(2**64)
        if self.folds:
            draws = (draws - self.fold / self.folds) % 1.0
        rest = (draws - self.test_fraction) / (1.0 - self.test_fraction)
        parts = np.where(rest < self.validation_fraction, Part.VALIDATION, Part.TRAIN)
        return np.where(draws < self.test_fraction, Part.TEST, parts).astype(np.int8)


_GROUPS = {
    "content": "equal prompts",
    "text": "prompts equal but for case, space and punctuation",
    "similarity": "prompts with similar embeddings",
}


def mixed(x: PromptHashes) -> PromptHashes:
    """Hashes 64-bit values with the mixer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
