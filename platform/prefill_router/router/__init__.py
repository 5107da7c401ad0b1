"""The router artifact: encoder identity, projections, predictor, pool."""

from prefill_router.router.artifact import (
    FORMAT,
    MANIFEST,
    Estimates,
    Router,
    RouterManifest,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Estimates",
    "Router",
    "RouterManifest",
]
