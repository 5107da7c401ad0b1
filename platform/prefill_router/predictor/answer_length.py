"""How long a target's answer to a prompt will be: what the price of output tokens is multiplied by.

log(1 + output tokens) is predicted, and with it the median length, which has the least absolute error. Costs need the
mean, which a few very long answers raise: the factor between the two is a target's own, and so is the spread.
"""

# N prompts, T targets

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# Where no answer's length was ever recorded, every target is priced at this one.
UNKNOWN_LENGTH_TOKENS = 256.0
_MAX_LOG = 12.0  # 160,000 tokens: no prompt is priced at infinity


def log_lengths(output_tokens: Array) -> Array:
    """Labels (N, T) of lengths (N, T), NaN where unknown; where none at all is known, UNKNOWN_LENGTH_TOKENS."""
    known = output_tokens if not np.isnan(output_tokens).all() else np.full_like(output_tokens, UNKNOWN_LENGTH_TOKENS)
    return np.asarray(np.log1p(known), np.float32)


def median_logs(output_tokens: Array) -> Array:
    """The log (T,) of each target's median length; a target without any takes the median of all."""
    logs = log_lengths(output_tokens)
    columns = [column[~np.isnan(column)] for column in logs.T]
    everyone = np.concatenate(columns)
    return np.array([np.median(column if len(column) else everyone) for column in columns], np.float32)


def spread(output_tokens: Array, logs: Array) -> Array:
    """The standard deviation (T,) of log lengths about the predicted ones (N, T); 0 where none is known."""
    residuals = np.log1p(output_tokens) - logs
    known = ~np.isnan(residuals)
    squares = np.where(known, residuals, 0.0) ** 2
    return np.asarray(np.sqrt(squares.sum(0) / np.maximum(known.sum(0), 1)), np.float32)


def median_tokens(logs: Array) -> Array:
    """Output tokens (N, T) of predicted logs (N, T), at least 1; an answer exceeds them half of the time."""
    return np.asarray(np.maximum(np.expm1(np.minimum(logs, _MAX_LOG)), 1.0), np.float32)


def mean_scale(output_tokens: Array, logs: Array) -> Array:
    """What 1 + the median is multiplied by (T,) for the mean, so that predicted lengths (N, T) sum to the known ones.

    1 where none is known. Source: Duan, "Smearing estimate" (1983), as the ratio of the sums.
    """
    known = ~np.isnan(output_tokens)
    actual = np.where(known, 1.0 + output_tokens, 0.0).sum(0)
    predicted = np.where(known, np.exp(np.minimum(logs, _MAX_LOG)), 0.0).sum(0)
    return np.asarray(np.where(actual > 0.0, actual / np.maximum(predicted, 1.0), 1.0), np.float32)


def mean_tokens(logs: Array, scale: Array) -> Array:
    """The output tokens (N, T) that are expected, at least 1, of predicted logs (N, T) and a scale (T,)."""
    return np.asarray(np.maximum(np.exp(np.minimum(logs, _MAX_LOG)) * scale - 1.0, 1.0), np.float32)


def quantile_tokens(logs: Array, spread: Array, q: float) -> Array:
    """The output tokens (N, T) that an answer exceeds with probability 1 - q."""
    return median_tokens(logs + spread * NormalDist().inv_cdf(q))
