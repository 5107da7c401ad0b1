"""The peak FLOPs that a job's workers could have computed so far, the denominator of MFU."""

from __future__ import annotations

from prefill_router.encoder.prefill_work import Work


class Capacity:
    """Sums over workers. A worker counts from its first task to the last task in which its encoder ran.

    A worker that ended, waits for its first task or only copies rows therefore adds nothing.
    """

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}
        self.encoder_flops = 0.0  # peak over the time in forward passes alone

    def add(self, worker: str, peak_flops: float, worked_s: float, work: Work) -> None:
        """Adds a task of `worker`: `peak_flops` is per second, `worked_s` is the time since its first task began."""
        if work.prompts:
            self._flops[worker] = max(self._flops.get(worker, 0.0), peak_flops * worked_s)
            self.encoder_flops += peak_flops * work.seconds

    @property
    def flops(self) -> float:
        return sum(self._flops.values())
