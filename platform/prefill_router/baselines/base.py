"""The interface of a baseline: its features, settings and learned arrays."""

# N prompts, T targets, F features

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Reads = Literal["nothing", "length", "embedding"]  # "length" is one feature, the number of tokens


class Baseline(ABC):
    """A predictor of P(correct). Subclasses are dataclasses of JSON settings; learned arrays end in an underscore."""

    title: ClassVar[str]  # the name shown in reports
    reads: ClassVar[Reads]

    @abstractmethod
    def fit(self, x: Array, correct: Array) -> Self: ...

    @abstractmethod
    def predict_proba(self, x: Array) -> NDArray[np.float64]: ...

    def tensors(self) -> dict[str, Array]:
        """The learned arrays."""
        return {name: value for name, value in vars(self).items() if name.endswith("_")}

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.endswith("_")}

    @classmethod
    def restored(cls, settings: dict[str, Any], tensors: dict[str, Array]) -> Self:
        baseline = cls(**settings)
        vars(baseline).update(tensors)
        return baseline


def mean_outcomes(correct: Array) -> NDArray[np.float64]:
    """The accuracy (T,) of each target; 0 for a target without outcomes."""
    graded = ~np.isnan(correct)
    return np.asarray(np.nan_to_num(correct).sum(0) / np.maximum(graded.sum(0), 1), np.float64)


def per_prompt(values_T: Array, x: Array) -> NDArray[np.float64]:
    return np.tile(np.asarray(values_T, np.float64), (len(x), 1))
