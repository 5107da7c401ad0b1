"""Loads either kind of router from its artifact: a trained one, or a baseline that an evaluation saved."""

from __future__ import annotations

from prefill_router import storage
from prefill_router.baselines.baseline_router import MANIFEST, BaselineRouter
from prefill_router.router import artifact
from prefill_router.router.artifact import Router


def load(uri: str) -> Router | BaselineRouter:
    """The router or baseline at `uri`. Raises UserError if there is neither, or it is damaged."""
    is_baseline = storage.exists(storage.join(uri, MANIFEST))
    return BaselineRouter.load(uri) if is_baseline else Router.load(uri)


def stamp(uri: str) -> str:
    """A string that changes when another router is written to `uri`; empty if there is none."""
    for manifest in (MANIFEST, artifact.MANIFEST):
        try:
            return storage.stamp(storage.join(uri, manifest))
        except FileNotFoundError:
            continue
    return ""
