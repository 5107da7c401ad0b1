"""How many replicas: by the work that waits for them, of which the number of requests says little: some are long."""

from __future__ import annotations

from typing import Any

WORK_S = "work_s"  # what a replica has begun and not begun, in seconds at its own speed


class ByWork:
    """Serve's autoscaling policy: as many replicas as have `target_work_s` of work each."""

    def __init__(self, target_work_s: float) -> None:
        self.target_work_s = target_work_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        work_s: dict[Any, float] = (context.aggregated_metrics or {}).get(WORK_S, {})
        return sum(work_s.values()) / self.target_work_s, {}
