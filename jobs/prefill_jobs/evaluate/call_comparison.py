"""Compares two routers on a gateway's calls: the estimate of the publish gate.

The published router sends a prompt to the target that it believes in, so its calls say how well both routers predict
what callers got, but not what another choice would have been worth. Calls that were left to chance say that, each
weighted by its propensity.
"""

# N calls, T targets, B draws

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.evaluate.log_job import places
from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.leakage import held_out
from prefill_jobs.graded.predictions import predict_graded
from prefill_jobs.runtime import cluster
from prefill_router.common.console import doing
from prefill_router.evaluation.off_policy import every_reward, load_log
from prefill_router.metrics import Interval, Scorer, bootstrap_weights, interval_from_draws
from prefill_router.router.artifact import Router


class CallComparison(NamedTuple):
    """Differences of the new router's figures from the published one's, with paired intervals."""

    num_calls: int
    num_chance: int  # calls among these that were made while exploring
    differences: Mapping[str, Interval]


@doing("comparing the routers on feedback")
def compare_on_calls(
    new: Router, published: Router, activations: str, calls: str, num_draws: int
) -> CallComparison | None:
    """Compares the routers on calls whose prompts are held out from both; None if none of these was left to chance.

    `brier_of_calls` is of all calls and their own targets. `mdp_auccc` and `mean_brier` are of those that were left to
    chance, and of every target: both are linear in the outcomes, apart from a term that the routers share, so doubly
    robust estimates of the outcomes give unbiased differences. Their model is the published router. Both routers choose
    by the costs that the new one expects. Raises UserError if a store lacks columns of a router.
    """
    published = published.with_pool(new.pool)
    graded = GradedStore.open(activations, calls, new.pool, ignore_unknown=True, correct_at=new.correct_at)
    cluster.connect()
    predicted, before = predict_graded(new, graded), predict_graded(published, graded)
    is_new = held_out([new, published], predicted.keys, graded.groups, drop=True)
    keys, log = load_log(calls, new.pool.target_names, new.correct_at)
    place, is_known = places(keys, predicted.keys)
    is_counted = is_known & is_new[place] & (log.chosen >= 0)
    if not (is_counted & (log.propensity < 1.0)).any():
        return None
    place, log = place[is_counted], log[is_counted]
    (p_new, lengths), (p_published, _) = ([values[place] for values in of.prediction] for of in (predicted, before))
    expected = new.pool.expected_cost(predicted.num_tokens[place], lengths)
    draws = bootstrap_weights(len(place), num_draws, clusters=log.clusters, all_first=True)
    rows, is_chance = np.arange(len(place)), log.propensity < 1.0
    errors = [np.square(p[rows, log.chosen] - log.reward) for p in (p_new, p_published)]
    differences = {"brier_of_calls": draws @ (errors[0] - errors[1]) / draws.sum(1)}
    estimated = every_reward(log, p_published)[is_chance]
    figures = [
        _figures(Scorer(estimated, p[is_chance], expected[is_chance]), draws[:, is_chance])
        for p in (p_new, p_published)
    ]
    differences |= {name: figures[0][name] - figures[1][name] for name in figures[0]}
    return CallComparison(
        len(place), int(is_chance.sum()), {name: interval_from_draws(values) for name, values in differences.items()}
    )


def _figures(scorer: Scorer, draws: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    figures = scorer.figures(draws)
    return {"mdp_auccc": figures["mdp_auccc"], "mean_brier": figures["brier"].mean(1)}
