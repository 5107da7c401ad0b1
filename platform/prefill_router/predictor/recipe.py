"""How a router is trained: the published recipe, and ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """How a net is trained. The defaults are the published ones. Source: METHOD, "SharedTrunkNet, as published"."""

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
    precision: Literal["float32", "bfloat16"] = "float32"  # of training's matrix products; weights are float32
    balance: float = 0.0  # a target's answers weigh (most answers of any target / its own) to this power


@dataclass(frozen=True)
class RouterRecipe:
    """How a whole router is trained."""

    trunk: Recipe = field(default_factory=Recipe)
    columns: Literal["own", "joint"] = "own"  # each target's own column, as published, or a joint set of the pool
    whiten: bool = False
    use_other_targets: bool = False  # outcomes of targets outside the pool teach too
    kernel: bool = False  # a kernel machine beside the trunk, and for lengths; without one, lengths are medians
    calibrate: bool = False


# What each choice of ours brings stands in tests/benchmarks/LOG.md.
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
