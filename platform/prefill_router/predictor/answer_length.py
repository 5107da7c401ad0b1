"""Answer length: the number of output tokens of a target's answer, which its output price is multiplied by.

Models predict log(1 + output tokens), hence the median length, which minimises the absolute error. Costs need the
mean, which a few very long answers raise. Each target has its own factor from median to mean, and its own spread.
"""

# N prompts, T targets

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# Assumed for every target if no answer's length was ever recorded.
UNKNOWN_LENGTH_TOKENS = 256.0
_MAX_LOG = 12.0  # 160,000 tokens; keeps expected costs finite


def without_lengths(outcomes: str) -> str:
    """The warning for outcomes in which no answer has a length or a cost."""
    return (
        f"{outcomes}: no answer has output_tokens or cost_usd: each is assumed to have {UNKNOWN_LENGTH_TOKENS:.0f} "
        "tokens, so costs are rough estimates"
    )


def log_lengths(output_tokens: Array) -> Array:
    """Converts lengths (N, T) to labels (N, T), NaN where unknown; UNKNOWN_LENGTH_TOKENS if all are unknown."""
    known = output_tokens if not np.isnan(output_tokens).all() else np.full_like(output_tokens, UNKNOWN_LENGTH_TOKENS)
    return np.asarray(np.log1p(known), np.float32)


def median_logs(output_tokens: Array) -> Array:
    """Returns the log (T,) of each target's median length; a target without lengths gets the median of all targets."""
    logs = log_lengths(output_tokens)
    columns = [column[~np.isnan(column)] for column in logs.T]
    everyone = np.concatenate(columns)
    return np.array([np.median(column if len(column) else everyone) for column in columns], np.float32)


def spread(output_tokens: Array, logs: Array) -> Array:
    """Returns the standard deviation (T,) of log lengths around predicted `logs` (N, T); 0 if no length is known."""
    residuals = np.log1p(output_tokens) - logs
    known = ~np.isnan(residuals)
    squares = np.where(known, residuals, 0.0) ** 2
    return np.asarray(np.sqrt(squares.sum(0) / np.maximum(known.sum(0), 1)), np.float32)


def median_tokens(logs: Array) -> Array:
    """Returns the median output tokens (N, T), at least 1, of predicted logs (N, T)."""
    return np.asarray(np.maximum(np.expm1(np.minimum(logs, _MAX_LOG)), 1.0), np.float32)


def mean_scale(output_tokens: Array, logs: Array) -> Array:
    """Fits the factors (T,) from 1 + median length to 1 + mean length, so that predicted sums match known sums.

    `logs` (N, T) are predicted. The factor is 1 if no length is known. Source: Duan, "Smearing estimate" (1983), as the
    ratio of the sums.
    """
    known = ~np.isnan(output_tokens)
    actual = np.where(known, 1.0 + output_tokens, 0.0).sum(0)
    predicted = np.where(known, np.exp(np.minimum(logs, _MAX_LOG)), 0.0).sum(0)
    return np.asarray(np.where(actual > 0.0, actual / np.maximum(predicted, 1.0), 1.0), np.float32)


def mean_tokens(logs: Array, scale: Array) -> Array:
    """Returns the expected output tokens (N, T), at least 1, of predicted logs (N, T) and factors (T,)."""
    return np.asarray(np.maximum(np.exp(np.minimum(logs, _MAX_LOG)) * scale - 1.0, 1.0), np.float32)


def quantile_tokens(logs: Array, spread: Array, q: float) -> Array:
    """Returns the output tokens (N, T) that an answer exceeds with probability 1 - q."""
    return median_tokens(logs + spread * NormalDist().inv_cdf(q))
