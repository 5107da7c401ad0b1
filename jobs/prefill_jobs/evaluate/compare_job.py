"""`compare`: compares routers on prompts held out from all of them, with paired differences."""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.leakage import held_out
from prefill_jobs.graded.predictions import GradedPrediction, predict_graded
from prefill_jobs.graded.reward_threshold import shared_threshold
from prefill_jobs.options import CompareConfig
from prefill_jobs.runtime import cluster
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.joined_stores import store_uris
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import PromptHashes
from prefill_router.corpus.split_groups import of_corpus
from prefill_router.evaluation.contenders import Contender, HeldOut, evaluate
from prefill_router.evaluation.results import Evaluation
from prefill_router.outcomes import check_columns
from prefill_router.policy.pool import load_pool
from prefill_router.reports import evaluation_page
from prefill_router.reports.versions import versions
from prefill_router.router.artifact import Router


def compare(config: CompareConfig) -> Evaluation:
    """Writes report.json and report.html to `config.out`. The first router is the reference.

    Each router reads the store of its own encoder. Raises UserError if a router has no store or lacks a target of the
    pool, or if no prompt is held out from all routers.
    """
    storage.check_output(config.out)
    uris = config.routers
    loaded = [Router.load(uri) for uri in uris]
    pool = loaded[0].pool if config.pool is None else load_pool(config.pool)
    routers = [router.with_pool(pool) for router in loaded]
    given = {ActivationStore.open(s).manifest.encoder.fingerprint: s for s in store_uris(config.activations)}
    stores = [_stores_of(uri, router, given) for uri, router in zip(uris, routers, strict=True)]
    check_columns(config.outcomes)
    groups = None if config.corpus is None else of_corpus(config.corpus)
    correct_at = shared_threshold(dict(zip(uris, loaded, strict=True)), config.correct_at)
    graded = [
        GradedStore.open(s, config.outcomes, pool, ignore_unknown=True, groups=groups, correct_at=correct_at)
        for s in stores
    ]
    cluster.connect()
    predicted = [predict_graded(router, g) for router, g in zip(routers, graded, strict=True)]
    first, kept = predicted[0], graded[0].groups
    keys = reduce(np.intersect1d, [of.keys for of in predicted])
    keys = keys[held_out(routers, keys, kept, drop=config.drop_leaked)]
    rows = _rows(first, keys)
    contenders = [_contender(uri, router, of, keys) for uri, router, of in zip(uris, routers, predicted, strict=True)]
    result = evaluate(
        pool,
        routers[0].version,
        HeldOut(
            first.num_tokens[rows],
            first.correct[rows],
            first.output_tokens[rows],
            kept.of(keys),
            first.cost_usd[rows],
        ),
        contenders[0],
        contenders[1:],
        p_uncalibrated=first.p_uncalibrated[rows],
        num_seen=len(first.keys) - len(keys),
        num_validation=loaded[0].training.get("num_validation"),
        num_draws=config.draws,
        about={
            "Outcomes": config.outcomes,
            **{uri: f"version {r.version}; {r.split.describe()}" for uri, r in zip(uris, loaded, strict=True)},
            "Versions": versions(),
        },
    )
    evaluation_page.write(config.out, result)
    return result


def _stores_of(uri: str, router: Router, stores: Mapping[str, str]) -> str:
    """The stores of the router's encoders, given stores by fingerprint. Raises UserError if one is missing."""
    for identity in router.encoders.values():
        if identity.fingerprint not in stores:
            raise UserError(
                f"{uri}: no store of its encoder {identity.spec.model} in --activations: add the store that it was "
                "trained on"
            )
    return ",".join(stores[identity.fingerprint] for identity in router.encoders.values())


def _contender(uri: str, router: Router, of: GradedPrediction, keys: PromptHashes) -> Contender:
    rows = _rows(of, keys)
    p_correct, expected = (values[rows] for values in of.prediction)
    return Contender(uri, uri, p_correct, expected, router.default_tolerance)


def _rows(of: GradedPrediction, keys: PromptHashes) -> NDArray[np.int64]:
    order = np.argsort(of.keys)
    return np.asarray(order[np.searchsorted(of.keys, keys, sorter=order)])
