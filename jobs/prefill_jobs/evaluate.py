"""`evaluate`: a router on the prompts of a store that it was not trained on, as JSON and an HTML report."""

from __future__ import annotations

import numpy as np

from prefill_jobs import cluster
from prefill_jobs.graded import GradedStore
from prefill_jobs.predict import predict_store
from prefill_jobs.probe import load_probes
from prefill_router import report, storage
from prefill_router.baselines import knn_p_correct
from prefill_router.config import EvaluateConfig
from prefill_router.evaluation import Evaluation, HeldOut
from prefill_router.evaluation import evaluate as score
from prefill_router.router import Router
from prefill_router.split import prompt_hashes


def evaluate(config: EvaluateConfig, notice: str | None = None) -> Evaluation:
    """Writes report.json and report.html to `config.out`; `notice` stands on top of the page.

    The prompts that training saw are left out, and serve as the neighbours of the baseline.
    """
    router = Router.load(config.router)
    graded = GradedStore.open(config.activations, config.outcomes, router.pool, ignore_unknown=config.ignore_unknown)
    router.check_encoder(graded.store.manifest.encoder.fingerprint, config.activations)
    probes = None if config.probe is None else load_probes(config.probe)
    cluster.connect()
    predicted = predict_store(router, graded.store)
    outcomes = graded.outcomes.align(predicted.prompt_ids)
    is_graded = ~np.isnan(outcomes.correct).all(1)
    seen = np.isin(prompt_hashes(predicted.prompt_ids.to_pylist()), router.training_prompts)
    rows, known = is_graded & ~seen, is_graded & seen
    knn = None
    if known.any():
        knn = knn_p_correct(predicted.features[rows], predicted.features[known], outcomes.correct[known])
    held_out = HeldOut(
        num_tokens=predicted.num_tokens[rows],
        correct=outcomes.correct[rows],
        output_tokens=outcomes.output_tokens[rows],
        p_correct=predicted.p_correct[rows],
        expected_output_tokens=predicted.expected_output_tokens[rows],
        knn_p_correct=knn,
    )
    result = score(router.pool, router.version, router.default_tolerance, held_out, int(known.sum()))
    storage.write_json(storage.join(config.out, "report.json"), result.to_json())
    page = report.render_html(result, probes, notice)
    storage.write_bytes(storage.join(config.out, "report.html"), page.encode())
    return result
