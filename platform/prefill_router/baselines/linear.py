"""Linear baselines with a logistic output: logistic regression, prompt length alone, matrix factorisation."""

# N prompts, F features, T targets, R rank

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from prefill_router.baselines.base import Baseline, Reads, mean_outcomes

Array = NDArray[Any]

_MIN_PER_CLASS = 2


class _Standardising(Baseline):
    """Standardises features by their mean and standard deviation in training."""

    def _fit_scaler(self, x: Array) -> None:
        std = np.std(x, axis=0, dtype=np.float64)
        self.mean_, self.std_ = np.mean(x, axis=0, dtype=np.float64), np.where(std > 0.0, std, 1.0)

    def _standardised(self, x: Array) -> NDArray[np.float64]:
        return np.asarray((np.asarray(x, np.float64) - self.mean_) / self.std_)


@dataclass
class Logistic(_Standardising):
    """One logistic regression per target on standardised features; a target with a single class keeps its mean.

    An outcome y between 0 and 1 counts as y of a right answer and 1 - y of a wrong one.
    """

    inverse_strength: float = 0.01  # scikit-learn's C
    title = "logistic regression"
    reads: ClassVar[Reads] = "embedding"

    def fit(self, x: Array, correct: Array) -> Self:
        self._fit_scaler(x)
        standardised = self._standardised(x)
        fitted = [self._of_target(standardised, y) for y in np.asarray(correct, np.float64).T]
        self.weights_ = np.stack([weights for weights, _ in fitted], axis=1)
        self.bias_ = np.array([bias for _, bias in fitted])
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        return _sigmoid(self._standardised(x) @ self.weights_ + self.bias_)

    def _of_target(self, x: Array, y: Array) -> tuple[Array, float]:
        from sklearn.linear_model import LogisticRegression

        graded = ~np.isnan(y)
        y, rows = y[graded], x[graded]
        # Every prompt appears once per class, weighted by its outcome y and by 1 - y.
        weight = np.concatenate([y, 1.0 - y])
        if min(y.sum(), (1.0 - y).sum()) < _MIN_PER_CLASS:
            return np.zeros(x.shape[1]), _log_odds(mean_outcomes(y[:, None])[0])
        used = weight > 0.0
        labels = np.repeat([1, 0], len(y))[used]
        model = LogisticRegression(C=self.inverse_strength, max_iter=500)
        model.fit(np.tile(rows, (2, 1))[used], labels, sample_weight=weight[used])
        return model.coef_[0], float(model.intercept_[0])


@dataclass
class PromptLength(Logistic):
    """Logistic regression on the logarithm of the prompt's length and its square."""

    inverse_strength: float = 1.0
    title = "prompt length alone"
    reads = "length"

    def fit(self, x: Array, correct: Array) -> Self:
        return super().fit(_powers(x), correct)

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        return super().predict_proba(_powers(x))


@dataclass
class MatrixFactorisation(_Standardising):
    """Low-rank model: the log-odds are the product of a prompt vector, linear in the features, and a target vector.

    This is the model of Ong et al. (RouteLLM, 2024) with outcomes instead of preferences, fitted by L-BFGS on the
    penalised cross-entropy.
    """

    rank: int = 16
    penalty: float = 1e-3
    random_state: int = 0
    title = "matrix factorisation"
    reads = "embedding"

    def fit(self, x: Array, correct: Array) -> Self:
        self._fit_scaler(x)
        rows = torch.from_numpy(self._standardised(x).astype(np.float32))
        graded = torch.from_numpy(~np.isnan(correct))
        labels = torch.from_numpy(np.nan_to_num(correct).astype(np.float32))
        draw = torch.Generator().manual_seed(self.random_state)
        (num_features, num_targets), rank = (rows.shape[1], labels.shape[1]), min(self.rank, labels.shape[1])
        prompts = torch.randn(num_features, rank, generator=draw) / num_features**0.5
        targets = torch.randn(rank, num_targets, generator=draw) / rank**0.5
        bias = torch.tensor([_log_odds(p) for p in mean_outcomes(correct)], dtype=torch.float32)
        parameters = [p.requires_grad_() for p in (prompts, targets, bias)]
        optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = rows @ prompts @ targets + bias
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            total = entropy[graded].mean() + self.penalty * (prompts.square().sum() + targets.square().sum())
            total.backward()
            return torch.as_tensor(total)

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        self.prompts_, self.targets_, self.bias_ = (p.detach().double().numpy() for p in parameters)
        return self

    def predict_proba(self, x: Array) -> NDArray[np.float64]:
        return _sigmoid(self._standardised(x) @ self.prompts_ @ self.targets_ + self.bias_)


def _powers(x: Array) -> NDArray[np.float64]:
    logs = np.log1p(np.asarray(x, np.float64))
    return np.concatenate([logs, logs**2], axis=1)


def _log_odds(p: float) -> float:
    clipped = min(max(p, 1e-3), 1.0 - 1e-3)
    return float(np.log(clipped / (1.0 - clipped)))


def _sigmoid(logits: Array) -> NDArray[np.float64]:
    # By numpy: scipy.special takes longer to import than a worker needs to start.
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -500.0, 500.0))))
