"""What another policy would have been worth, from requests whose targets a gateway chose by chance.

A request tells of the target that answered it alone. Weighed by how likely that choice was, such requests stand for
all: inverse propensity (Horvitz and Thompson, 1952), its self-normalised form (Swaminathan and Joachims, 2015), and the
doubly robust estimate, which starts from a model and corrects it (Dudik, Langford and Li, 2011).
"""

# N requests, T targets, B bootstrap draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.common.schema import CORRECT, PROMPT_ID, PROPENSITY, TARGET
from prefill_router.corpus.split import prompt_hashes
from prefill_router.metrics import Interval, bootstrap_weights, interval
from prefill_router.metrics.discrimination import ratio
from prefill_router.outcomes import load_feedback

Array = NDArray[Any]


@dataclass(frozen=True)
class Log:
    """Requests, what answered them, and how likely that was."""

    chosen: Array  # (N,) target; -1 is one that no policy here can choose
    reward: Array  # (N,) in [0, 1]
    propensity: Array  # (N,) in (0, 1]
    clusters: Array | None = None  # (N,) requests with the same prompt share one

    def __post_init__(self) -> None:
        if not len(self.chosen):
            raise UserError("the log holds no request with an outcome")
        if not ((self.propensity > 0) & (self.propensity <= 1)).all():
            raise UserError("propensities must be above 0, and at most 1")

    def __getitem__(self, rows: Array) -> Log:
        clusters = None if self.clusters is None else self.clusters[rows]
        return Log(self.chosen[rows], self.reward[rows], self.propensity[rows], clusters)


def load_log(uri: str, targets: Sequence[str]) -> tuple[NDArray[np.uint64], Log]:
    """Reads feedback at `uri`: hashes of the prompts (N,), and the requests; target -1 is one that is not of `targets`.

    Raises UserError if there is no graded request, or a file has no propensities.
    """
    table = load_feedback(uri)
    keys = prompt_hashes(table[PROMPT_ID].to_pylist())
    index = pc.index_in(table[TARGET], value_set=pa.array(list(targets), pa.string()))
    chosen = np.asarray(pc.fill_null(index, -1), np.int64)
    reward, propensity = (table[name].to_numpy().astype(np.float64) for name in (CORRECT, PROPENSITY))
    return keys, Log(chosen, reward, propensity, keys)


@dataclass(frozen=True)
class PolicyValue:
    """The expected reward of a policy, by each estimate, and how much of the log speaks of it."""

    policy: str
    ips: Interval
    snips: Interval
    doubly_robust: Interval
    model: float  # what the model says by itself
    support: float  # share of requests on which the policy's choice could have been logged, as far as the log tells
    effective_requests: float  # as many without weights would tell as much (Kish, 1965)


def policy_value(policy: str, log: Log, choice: Array, model: Array, num_draws: int = 500) -> PolicyValue:
    """The value of a policy that chooses `choice` (N,); `model` (N, T) is the reward that is expected of targets."""
    rows = np.arange(len(choice))
    is_same = choice == log.chosen
    weight = is_same / log.propensity
    expected = np.asarray(model, np.float64)
    robust = expected[rows, choice] + weight * (log.reward - expected[rows, log.chosen])
    drawn = bootstrap_weights(len(choice), num_draws, clusters=log.clusters)
    draws = np.concatenate([np.ones((1, len(choice))), drawn])
    num_drawn = draws.sum(1)
    weighed = draws @ (weight * log.reward)

    def of(values_B: Array) -> Interval:
        return interval(float(values_B[0]), values_B[1:])

    return PolicyValue(
        policy=policy,
        ips=of(weighed / num_drawn),
        snips=of(ratio(weighed, draws @ weight)),
        doubly_robust=of(draws @ robust / num_drawn),
        model=float(expected[rows, choice].mean()),
        # Where a choice was certain, no other could have been logged.
        support=float((is_same | (log.propensity < 1.0)).mean()),
        effective_requests=float(ratio(np.square(weight.sum()), np.square(weight).sum())),
    )
