"""`evaluate`: a router on the prompts of a store that it was not trained on, as JSON and an HTML report."""

from __future__ import annotations

import numpy as np

from prefill_jobs import cluster
from prefill_jobs.graded import GradedStore
from prefill_jobs.predict import predict_graded
from prefill_jobs.probe import load_probes
from prefill_router import report, storage
from prefill_router.baselines import knn_p_correct
from prefill_router.config import EvaluateConfig
from prefill_router.evaluation import Evaluation, HeldOut
from prefill_router.evaluation import evaluate as score
from prefill_router.router import Router


def evaluate(config: EvaluateConfig, notice: str | None = None) -> Evaluation:
    """Writes report.json and report.html to `config.out`; `notice` stands on top of the page.

    The prompts that training saw are left out, and serve as the neighbours of the baseline.
    """
    router = Router.load(config.router)
    graded = GradedStore.open(config.activations, config.outcomes, router.pool, ignore_unknown=config.ignore_unknown)
    router.check_encoder(graded.store.manifest.encoder.fingerprint, config.activations)
    probes = None if config.probe is None else load_probes(config.probe)
    cluster.connect()
    predicted = predict_graded(router, graded, with_features=True)
    seen = np.isin(predicted.keys, router.training_prompts)
    knn = None
    if seen.any() and predicted.features is not None:
        knn = knn_p_correct(predicted.features[~seen], predicted.features[seen], predicted.correct[seen])
    held_out = HeldOut(
        num_tokens=predicted.num_tokens[~seen],
        correct=predicted.correct[~seen],
        output_tokens=predicted.output_tokens[~seen],
        p_correct=predicted.prediction.p_correct[~seen],
        p_uncalibrated=predicted.p_uncalibrated[~seen],
        expected_output_tokens=predicted.prediction.expected_output_tokens[~seen],
        knn_p_correct=knn,
    )
    result = score(router.pool, router.version, router.default_tolerance, held_out, int(seen.sum()))
    storage.write_json(storage.join(config.out, "report.json"), result.to_json())
    page = report.render_html(result, probes, notice)
    storage.write_bytes(storage.join(config.out, "report.html"), page.encode())
    return result
