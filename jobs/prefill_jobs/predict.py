"""A router's predictions for the graded prompts of an activation store, beside what came of them, on Ray Data."""

# N prompts, T targets of the router, F features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs import cluster
from prefill_jobs.graded import GradedStore
from prefill_router.router import Router
from prefill_router.schema import NUM_TOKENS
from prefill_router.split import Keys, prompt_hashes


@dataclass(frozen=True)
class GradedPrediction:
    """In the store's order."""

    keys: Keys  # (N,)
    num_tokens: NDArray[np.int32]  # (N,)
    correct: NDArray[np.float32]  # (N, T), NaN where missing
    output_tokens: NDArray[np.float32]  # (N, T), NaN where missing
    p_correct: NDArray[np.float32]  # (N, T)
    p_uncalibrated: NDArray[np.float32]  # (N, T)
    expected_output_tokens: NDArray[np.float32]  # (N, T)
    features: NDArray[np.float32] | None  # (N, F), where asked for


def predict_graded(router: Router, graded: GradedStore, *, with_features: bool = False) -> GradedPrediction:
    """Raises UserError where the store was written by another encoder than the router's."""
    router.check_encoder(graded.store.manifest.encoder.fingerprint, graded.store.uri)
    items = [{"shard": shard} for shard in range(graded.store.num_shards)]
    arguments = {"router": router, "graded": graded, "with_features": with_features}
    rows = cluster.map_rows(items, _predict_shard, fn_kwargs=arguments)
    parts = [row["arrays"] for row in sorted(rows, key=lambda row: int(row["shard"]))]
    gathered: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return GradedPrediction(**{"features": None, **gathered})


def _predict_shard(item: dict[str, Any], router: Router, graded: GradedStore, with_features: bool) -> dict[str, Any]:
    ids, activations = graded.store.read(int(item["shard"]), router.columns)
    keys, num_targets = prompt_hashes(ids.to_pylist()), len(graded.pool.targets)
    correct, output_tokens = (values[:, :num_targets] for values in graded.answers(keys))
    rows = ~np.isnan(correct).all(1)
    features = router.features(activations)[rows]
    p_uncalibrated = router.uncalibrated(features)
    arrays = {
        "keys": keys[rows],
        "num_tokens": activations[NUM_TOKENS][rows],
        "correct": correct[rows],
        "output_tokens": output_tokens[rows],
        "p_correct": router.calibration(p_uncalibrated),
        "p_uncalibrated": p_uncalibrated,
        "expected_output_tokens": router.length(features),
    }
    return {**item, "arrays": arrays | ({"features": features} if with_features else {})}
