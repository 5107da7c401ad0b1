"""A router's predictions for every prompt of an activation store, on Ray Data."""

# N prompts, T targets, F features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_jobs import cluster
from prefill_router.features import ActivationStore
from prefill_router.router import Router
from prefill_router.schema import NUM_TOKENS


@dataclass(frozen=True)
class StorePrediction:
    """In the store's order."""

    prompt_ids: pa.Array  # (N,)
    num_tokens: NDArray[np.int32]  # (N,)
    p_correct: NDArray[np.float32]  # (N, T)
    expected_output_tokens: NDArray[np.float32]  # (N, T)
    features: NDArray[np.float32]  # (N, F)


def predict_store(router: Router, store: ActivationStore) -> StorePrediction:
    """Raises UserError where the store was written by another encoder than the router's."""
    router.check_encoder(store.manifest.encoder.fingerprint, store.uri)
    items = [{"shard": shard} for shard in range(store.num_shards)]
    rows = cluster.map_rows(items, _predict_shard, fn_kwargs={"router": router, "store": store})
    parts = [row["arrays"] for row in sorted(rows, key=lambda row: int(row["shard"]))]

    def gather(name: str) -> NDArray[Any]:
        return np.concatenate([part[name] for part in parts])

    return StorePrediction(
        store.prompt_ids(),
        gather("num_tokens"),
        gather("p_correct"),
        gather("expected_output_tokens"),
        gather("features"),
    )


def _predict_shard(item: dict[str, Any], router: Router, store: ActivationStore) -> dict[str, Any]:
    _, activations = store.read(int(item["shard"]), router.columns)
    prediction = router.predict_activations(activations)
    arrays = {
        "num_tokens": activations[NUM_TOKENS],
        "p_correct": prediction.p_correct,
        "expected_output_tokens": prediction.expected_output_tokens,
        "features": router.features(activations),
    }
    return {**item, "arrays": arrays}
