"""`evaluate` on feedback: estimates the value of the router, and of each single target, on the requests of a log."""

# N requests, T targets

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.leakage import held_out
from prefill_jobs.graded.predictions import predict_graded
from prefill_jobs.graded.reward_threshold import shared_threshold
from prefill_jobs.options import EvaluateConfig
from prefill_jobs.runtime import cluster
from prefill_router import storage
from prefill_router.common.console import doing
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import PromptHashes
from prefill_router.corpus.split_groups import of_corpus
from prefill_router.evaluation.latency_frontier import latency_frontier
from prefill_router.evaluation.off_policy import PolicyValue, load_log, policy_value
from prefill_router.policy.selection import choose
from prefill_router.reports.log_page import LogReport, write_report
from prefill_router.reports.number_format import exactly
from prefill_router.reports.versions import versions
from prefill_router.router.artifact import Router


def places(keys: PromptHashes, of_store: PromptHashes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each prompt (N,) is in the store, given their hashes, and whether it is there at all."""
    order = np.argsort(of_store)
    place = order[np.minimum(np.searchsorted(of_store, keys, sorter=order), len(order) - 1)]
    return place, of_store[place] == keys


def evaluate_log(config: EvaluateConfig) -> list[PolicyValue]:
    """Writes log.json and log.html to `config.out`, and returns the policies' values, the router's first.

    Only requests on held-out prompts count. Raises UserError if the log has none on a held-out prompt of the store.
    """
    storage.check_output(config.out)
    router = Router.load(config.router)
    correct_at = shared_threshold({config.router: router}, config.correct_at)
    groups = None if config.corpus is None else of_corpus(config.corpus)
    graded = GradedStore.open(
        config.activations,
        config.outcomes,
        router.pool,
        ignore_unknown=config.ignore_unknown,
        groups=groups,
        correct_at=correct_at,
    )
    cluster.connect()
    predicted = predict_graded(router, graded)
    is_new = held_out([router], predicted.keys, graded.groups, drop=config.drop_leaked)
    keys, log = load_log(config.outcomes, router.pool.target_names, correct_at)
    place, is_known = places(keys, predicted.keys)
    is_counted = is_known & is_new[place]
    if not is_counted.any():
        raise UserError(
            f"{config.outcomes}: no request has a prompt of {config.activations} that is held out from the router: "
            "extract the log's prompts, or use a newer log"
        )
    place, log = place[is_counted], log[is_counted]
    p_correct, lengths = (values[place] for values in predicted.prediction)
    expected = router.pool.expected_cost(predicted.num_tokens[place], lengths)
    policies = {"router": choose(p_correct, expected, router.default_tolerance)}
    policies |= {f"always {name}": np.full(len(place), t) for t, name in enumerate(router.pool.target_names)}
    with doing("drawing bootstrap samples"):
        values = [policy_value(name, log, choice, p_correct, config.draws) for name, choice in policies.items()]
        frontier = latency_frontier(log, p_correct, expected, router.default_tolerance, config.draws)
    report = LogReport(
        router_version=router.version,
        pool=router.pool.name,
        num_requests=len(place),
        explored=float((log.propensity < 1.0).mean()),
        mean_reward=float(log.reward.mean()),
        policies=values,
        frontier=frontier,
        num_draws=config.draws,
        about={
            "Feedback": config.outcomes,
            "Prompts": f"{config.activations}, of {graded.store.corpus}",
            "Router": config.router,
            "Tolerance": exactly(router.default_tolerance),
            "Versions": versions(),
        },
    )
    write_report(config.out, report)
    return values
