"""Autoscaling by queued work instead of request count, as prompts differ in length.

Serve's controller imports this module, so it stays free of torch and transformers.
"""

from __future__ import annotations

from typing import Any

WORK_S = "work_s"  # running and queued work of a replica, in seconds at its measured speed


class ByWork:
    """Serve autoscaling policy: one replica per `target_work_s` seconds of queued work."""

    def __init__(self, target_work_s: float) -> None:
        self.target_work_s = target_work_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        work_s: dict[Any, float] = (context.aggregated_metrics or {}).get(WORK_S, {})
        return sum(work_s.values()) / self.target_work_s, {}
