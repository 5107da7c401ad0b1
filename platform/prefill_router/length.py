"""How long a target's answer to a prompt will be: what the price of output tokens is multiplied by.

A net like the trunk predicts the mean and the spread of log(1 + output tokens), standardised by target. Expected
lengths are a log-normal's means, times a factor by target that makes them unbiased on held-out answers.
"""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefill_router.trunk import SharedTrunkNet, normal_parameters

Array = NDArray[np.float32]

# Where no answer's length was ever recorded, every target is priced at this one.
UNKNOWN_LENGTH_TOKENS = 256.0
_MAX_LOG = 12.0  # 160,000 tokens: no prompt is priced at infinity
_MIN_STD = 1e-6


class LengthScale(NamedTuple):
    """Mean and standard deviation (T,) of log(1 + output tokens)."""

    mean: Array
    std: Array

    @classmethod
    def of(cls, output_tokens: Array) -> LengthScale:
        """From lengths (N, T), NaN where unknown. A target without any takes the scale of all."""
        logs = np.log1p(output_tokens.astype(np.float64))
        known = ~np.isnan(logs)
        everyone = logs[known] if known.any() else np.log1p([UNKNOWN_LENGTH_TOKENS])
        columns = [column[mask] if mask.any() else everyone for column, mask in zip(logs.T, known.T, strict=True)]
        mean, std = [c.mean() for c in columns], [max(c.std(), _MIN_STD) for c in columns]
        return cls(np.array(mean, np.float32), np.array(std, np.float32))

    def standardised(self, output_tokens: Array) -> Array:
        """Labels (N, T) for the net; NaN stays NaN."""
        return (np.log1p(output_tokens) - self.mean) / self.std


@dataclass(frozen=True)
class LengthHead:
    """`net` gives mean and log standard deviation of a target's standardised log length: a log-normal distribution."""

    net: SharedTrunkNet
    scale: LengthScale
    factor: Array  # (T,)

    def of_targets(self, targets: Sequence[int]) -> LengthHead:
        """The head of some targets."""
        own, num_targets = list(targets), len(self.factor)
        net = self.net.of_outputs([*own, *(num_targets + t for t in own)])
        return LengthHead(net, LengthScale(self.scale.mean[own], self.scale.std[own]), self.factor[own])

    def __call__(self, features: Array) -> Array:
        """Expected output tokens (N, T) of features (N, F), at least 1."""
        mean, std = self._logs(features)
        return self._tokens(mean + std**2 / 2.0, self.factor)

    def quantile(self, features: Array, q: float) -> Array:
        """The output tokens (N, T) that an answer exceeds with probability 1 - q; 0.5 is the median."""
        mean, std = self._logs(features)
        return self._tokens(mean + std * NormalDist().inv_cdf(q), np.float32(1.0))

    @torch.inference_mode()
    def _logs(self, features: Array) -> tuple[Array, Array]:
        """Mean and standard deviation (N, T) of log(1 + output tokens), the seeds' means."""
        mean, log_std = normal_parameters(self.net(torch.from_numpy(features)))
        return mean.mean(0).numpy() * self.scale.std + self.scale.mean, log_std.exp().mean(0).numpy() * self.scale.std

    @staticmethod
    def _tokens(logs: Array, factor: Array | np.float32) -> Array:
        return np.asarray(np.maximum(np.exp(np.minimum(logs, _MAX_LOG)) * factor - 1.0, 1.0), np.float32)


def mean_factor(output_tokens: Array, expected: Array) -> Array:
    """What expected lengths (N, T) are to be multiplied by (T,) to match the mean of the known lengths (N, T)."""
    known = ~np.isnan(output_tokens)
    observed = np.where(known, output_tokens + 1.0, 0.0).sum(0)
    predicted = np.where(known, expected + 1.0, 0.0).sum(0)
    return np.where(known.any(0), observed / np.maximum(predicted, 1.0), 1.0).astype(np.float32)
