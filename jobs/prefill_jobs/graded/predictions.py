"""Computes a router's predictions for the graded prompts of an activation store, on Ray Data."""

# N prompts, T targets of the router, F features

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.runtime import ray_tasks
from prefill_jobs.runtime.progress import counted
from prefill_router.corpus.split import PromptHashes
from prefill_router.policy.decision import Prediction
from prefill_router.router.artifact import Estimates, Router


@dataclass(frozen=True)
class GradedPrediction:
    """Outcomes of the graded store's targets and predictions for the router's targets, in the store's order."""

    keys: PromptHashes  # (N,)
    num_tokens: NDArray[np.int32]  # (N,)
    correct: NDArray[np.float32]  # (N, T), NaN where missing
    output_tokens: NDArray[np.float32]  # (N, T), NaN where missing, implied by a billed cost if only that is known
    cost_usd: NDArray[np.float32]  # (N, T) as billed, NaN where unknown
    estimates: Estimates  # (N, T) each
    p_uncalibrated: NDArray[np.float32]  # (N, T)
    prediction: Prediction  # (N, T) each
    features: NDArray[np.float32] | None  # (N, F), if requested


def predict_graded(router: Router, graded: GradedStore, *, with_features: bool = False) -> GradedPrediction:
    """Predicts for every graded prompt. Raises UserError if the store lacks an encoder of the router."""
    graded = graded.of_encoders(router.encoders)
    task = partial(_predict_shard, router=router, graded=graded, with_features=with_features)
    num_shards = graded.store.num_shards
    found = counted(ray_tasks.map_items(task, range(num_shards)), "predict", num_shards, "shards")
    parts = [arrays for _, arrays in sorted(found, key=itemgetter(0))]
    gathered: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    estimates = Estimates(*(gathered.pop(name) for name in Estimates._fields))
    return GradedPrediction(
        **{"features": None, **gathered},
        estimates=estimates,
        p_uncalibrated=router.uncalibrated(estimates),
        prediction=router.prediction(estimates),
    )


def _predict_shard(
    shard: int, router: Router, graded: GradedStore, with_features: bool
) -> tuple[int, dict[str, NDArray[Any]]]:
    rows = graded.of_pool().rows(shard, router.projections)
    arrays = rows._asdict() | router.estimates(rows.features)._asdict()
    if not with_features:
        del arrays["features"]
    return shard, arrays
