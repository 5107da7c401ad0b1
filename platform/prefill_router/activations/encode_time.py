"""What an encoder's columns cost to serve: milliseconds a prompt, as its extraction measured them."""

from __future__ import annotations

from typing import Any

from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.joined_stores import JoinedStores
from prefill_router.common.schema import ActivationColumn

SUMMARY = "summary.json"
ENCODE_MS = "encode_ms"
_FLOPS = 1e11


def encode_times(store: ActivationStore | JoinedStores) -> dict[ActivationColumn, float]:
    """The milliseconds that an encoder takes to each column of a prompt of mean length.

    The time down to the deepest column is measured, and is shared out over its layers. A store without a measurement,
    from an older release, gets an estimate by its encoder's size.
    """
    stores = store.stores if isinstance(store, JoinedStores) else {"": store}
    times: dict[ActivationColumn, float] = {}
    for name, own in stores.items():
        deepest = max(1, *(column.layer for column in own.columns))
        total = measured_ms(own.uri) or _estimated_ms(own, deepest)
        times |= {column.of(name): total * column.layer / deepest for column in own.columns}
    return times


def measured_ms(uri: str) -> float | None:
    """The milliseconds a prompt in the summary of a store; None if it has none."""
    path = storage.join(uri, SUMMARY)
    summary: Any = storage.read_json(path) if storage.exists(path) else {}
    return summary.get(ENCODE_MS) if isinstance(summary, dict) else None


def _estimated_ms(store: ActivationStore, num_blocks: int) -> float:
    """The time of a Llama-shaped block, whose weights are 12 D^2, on a CPU core with fast bfloat16."""
    tokens = store.manifest.shards.total("num_tokens") / max(1, store.num_rows)
    return float(24.0 * store.manifest.encoder.hidden_size**2 * num_blocks * tokens / _FLOPS * 1000.0)
