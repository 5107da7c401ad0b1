"""What all baselines share: what they read, and how they are written down."""

# N prompts, T targets, F features

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Reads = Literal["nothing", "length", "embedding"]  # one feature, the number of tokens; or a sentence embedding


class Baseline(ABC):
    """Subclasses are dataclasses of plain settings; what they learn are arrays whose names end in an underscore."""

    title: ClassVar[str]  # in tables
    reads: ClassVar[Reads]

    @abstractmethod
    def fit(self, x: Array, correct: Array) -> Self: ...

    @abstractmethod
    def predict_proba(self, x: Array) -> NDArray[np.float64]: ...

    def tensors(self) -> dict[str, Array]:
        """All that was learnt."""
        return {name: value for name, value in vars(self).items() if name.endswith("_")}

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.endswith("_")}

    @classmethod
    def restored(cls, settings: dict[str, Any], tensors: dict[str, Array]) -> Self:
        baseline = cls(**settings)
        vars(baseline).update(tensors)
        return baseline


def mean_outcomes(correct: Array) -> NDArray[np.float64]:
    """Each target's accuracy (T,); 0 for one that was never graded."""
    graded = ~np.isnan(correct)
    return np.asarray(np.nan_to_num(correct).sum(0) / np.maximum(graded.sum(0), 1), np.float64)


def per_prompt(values_T: Array, x: Array) -> NDArray[np.float64]:
    return np.tile(np.asarray(values_T, np.float64), (len(x), 1))
