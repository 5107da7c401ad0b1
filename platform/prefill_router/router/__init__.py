"""The trained router and its artifact on disk.

`artifact` has `Router`, which predicts and decides; `artifact_folder` writes and reads artifact folders, of served
baselines too. Start with `Router`.
"""

from prefill_router.router.artifact import (
    MANIFEST,
    Estimates,
    Router,
    RouterManifest,
)

__all__ = [
    "MANIFEST",
    "Estimates",
    "Router",
    "RouterManifest",
]
