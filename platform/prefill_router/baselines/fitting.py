"""Fits the baselines on a router's training prompts and chooses their tolerances."""

# N prompts, T targets, F features

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.baselines import BASELINES, Always, Mixture, Random
from prefill_router.baselines.base import Baseline, Reads
from prefill_router.common.console import doing
from prefill_router.metrics import best_tolerance
from prefill_router.policy.answer_cost import answer_costs
from prefill_router.policy.pool import Pool
from prefill_router.predictor.answer_length import median_logs, median_tokens

Array = NDArray[Any]


@dataclass(frozen=True)
class Prompts:
    """Prompt features and outcomes."""

    num_tokens: Array  # (N,) billed input tokens
    correct: Array  # (N, T), NaN where missing
    output_tokens: Array  # (N, T), NaN where neither known nor implied by a billed cost
    length: Array  # (N,) in the sentence encoder's tokens, if there is one
    embedding: Array | None  # (N, F); None if the prompts' texts are not available
    cost_usd: Array | None = None  # (N, T) as billed, NaN where unknown

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, rows: Array) -> Prompts:
        return Prompts(
            num_tokens=self.num_tokens[rows],
            correct=self.correct[rows],
            output_tokens=self.output_tokens[rows],
            length=self.length[rows],
            embedding=None if self.embedding is None else self.embedding[rows],
            cost_usd=None if self.cost_usd is None else self.cost_usd[rows],
        )

    @cached_property
    def median_output_tokens(self) -> NDArray[np.float32]:
        """The median answer length (T,) of each target."""
        return median_tokens(median_logs(self.output_tokens))

    def x(self, reads: Reads) -> Array:
        """The features (N, F) that a baseline reads."""
        if reads == "embedding" and self.embedding is not None:
            return self.embedding
        return np.asarray(self.length)[:, None]


@dataclass(frozen=True)
class Fitted:
    """A fitted baseline with its tolerance."""

    name: str  # key in BASELINES
    title: str
    baseline: Baseline
    output_tokens: NDArray[np.float32]  # (T,) each target's median in training
    tolerance: float

    def p_correct(self, prompts: Prompts) -> NDArray[np.float64]:
        return self.baseline.predict_proba(prompts.x(type(self.baseline).reads))


def fit_all(pool: Pool, training: Prompts, validation: Prompts) -> Iterator[Fitted]:
    """Yields every baseline, fitted; skips those that read embeddings if there are none.

    As for a router, the tolerance is chosen on the validation prompts, which fitting does not use.
    """
    for target, name in enumerate(pool.target_names):
        always = Always(target).fit(training.x("nothing"), training.correct)
        yield Fitted("always", f"always {name}", always, training.median_output_tokens, 0.0)
    for name, kind in BASELINES.items():
        if kind is Always or (kind.reads == "embedding" and training.embedding is None):
            continue
        baseline = Mixture(_paid(pool, training, training).mean(0).tolist()) if kind is Mixture else kind()
        yield fit_one(pool, name, baseline, training, validation)


def fit_one(pool: Pool, name: str, baseline: Baseline, training: Prompts, validation: Prompts) -> Fitted:
    """Fits one baseline and chooses its tolerance."""
    with doing(f"fitting the baseline {baseline.title}"):
        baseline.fit(training.x(type(baseline).reads), training.correct)
        tolerance = _tolerance(pool, baseline, training, validation)
    return Fitted(name, baseline.title, baseline, training.median_output_tokens, tolerance)


def _tolerance(pool: Pool, baseline: Baseline, training: Prompts, validation: Prompts) -> float:
    if not len(validation) or isinstance(baseline, Random):  # random probabilities make any tolerance meaningless
        return 0.0
    p = baseline.predict_proba(validation.x(type(baseline).reads))
    expected = pool.expected_cost(validation.num_tokens, np.broadcast_to(training.median_output_tokens, p.shape))
    return best_tolerance(validation.correct, p, expected, _paid(pool, training, validation))


def _paid(pool: Pool, training: Prompts, prompts: Prompts) -> Array:
    """The costs (N, T) of answers, at the training median where a length is unknown."""
    medians = training.median_output_tokens
    return answer_costs(pool, prompts.num_tokens, prompts.output_tokens, prompts.cost_usd, medians)
