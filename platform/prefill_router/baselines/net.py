"""The published trunk on sentence embeddings instead of prefill activations: the strongest text-only baseline."""

# N prompts, F features, T targets

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from prefill_router.baselines.base import Baseline
from prefill_router.predictor.data_loader import Rows, WorkerRows
from prefill_router.predictor.recipe import Recipe
from prefill_router.predictor.training import Trainer, fit
from prefill_router.predictor.trunk import SharedTrunkNet

Array = NDArray[Any]

_VALIDATION_SHARE = 0.15


@dataclass
class EmbeddingNet(Baseline):
    """SharedTrunkNet on standardised features, with 15 % of the prompts for early stopping.

    Source: platform/METHOD.md, "SharedTrunkNet, as published".
    """

    random_state: int = 0
    title = "MLP"
    reads = "embedding"

    def fit(self, x: Array, correct: Array) -> Self:
        std = np.std(x, axis=0)
        self.mean_, self.std_ = np.mean(x, axis=0), np.where(std > 0.0, std, 1.0)
        features, labels = self._standardised(x), torch.from_numpy(np.asarray(correct, np.float32))
        rows = Rows(features, labels, torch.arange(len(x), dtype=torch.int32))
        order = torch.from_numpy(np.random.default_rng(self.random_state).permutation(len(x)))
        num_validation = max(1, round(_VALIDATION_SHARE * len(x)))
        validation, training = rows[order[:num_validation]], rows[order[num_validation:]]
        trainer = Trainer(Recipe(), x.shape[1], [1.0] * correct.shape[1], self.random_state)
        fit(WorkerRows([len(training)], {0: training}, {0: validation}, training[:0]), trainer, self.random_state)
        state = trainer.fitted().net.state_dict()
        vars(self).update({f"{name}_": value.numpy() for name, value in state.items()})
        return self

    @torch.inference_mode()
    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        state = {name.removesuffix("_"): torch.from_numpy(value) for name, value in self.tensors().items()}
        del state["mean"], state["std"]
        net = SharedTrunkNet.from_state(state)
        return np.asarray(torch.sigmoid(net(self._standardised(x))).mean(0).double().numpy())

    def _standardised(self, x: Array) -> torch.Tensor:
        return torch.from_numpy(np.asarray((x - self.mean_) / self.std_, np.float32))
