"""Training recipes of a router: the published one, and the one that does best here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Training settings of a net. Defaults are published: platform/METHOD.md, "SharedTrunkNet, as published"."""

    hidden: tuple[int, ...] = (256, 128)
    dropout: tuple[float, ...] = (0.3, 0.2)  # after each hidden layer
    input_dropout: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    decoupled_decay: bool = False  # AdamW's (Loshchilov and Hutter, 2019), not Adam's L2
    batch_size: int = 512
    max_epochs: int = 150
    patience: int = 15  # epochs without progress
    num_seeds: int = 10
    keep: int = 5
    label_smoothing: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in training; weights are float32
    balance: float = 0.0  # exponent of a target's weight, (most answers of any target / its own answers) ** balance


@dataclass(frozen=True)
class RouterRecipe:
    """Training settings of a whole router."""

    trunk: Recipe = field(default_factory=Recipe)
    columns: Literal["own", "joint"] = "own"  # each target's own column, as published, or one set for the pool
    whiten: bool = False
    use_other_targets: bool = False  # also train on outcomes of targets outside the pool
    kernel: bool = False  # fit a kernel machine for P(correct) and lengths; without it, lengths are medians
    calibrate: bool = False


# tests/benchmarks/LOG.md has the measured effect of each setting of "best".
RECIPES = {
    "published": RouterRecipe(),
    "best": RouterRecipe(
        trunk=Recipe(input_dropout=0.3, balance=0.5),
        columns="joint",
        use_other_targets=True,
        kernel=True,
        calibrate=True,
    ),
}
