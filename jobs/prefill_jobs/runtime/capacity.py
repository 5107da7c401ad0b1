"""The peak FLOPs that a job's workers could have computed so far, the denominator of MFU."""

from __future__ import annotations

from dataclasses import dataclass

from prefill_router.encoder.prefill_work import Work


@dataclass(frozen=True)
class Effort:
    """The work of one task, and the worker that did it."""

    work: Work
    worker: str
    peak_flops: float  # per second
    worked_s: float  # since the worker's first task began
    num_retries: int = 0


class Capacity:
    """Sums over workers. A worker counts from its first task to the last task in which its encoder ran.

    A worker that ended, waits for its first task or only copies rows therefore adds nothing.
    """

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}
        self.encoder_flops = 0.0  # peak over the time in forward passes alone

    def add(self, effort: Effort) -> None:
        if effort.work.prompts:
            worked_flops = effort.peak_flops * effort.worked_s
            self._flops[effort.worker] = max(self._flops.get(effort.worker, 0.0), worked_flops)
            self.encoder_flops += effort.peak_flops * effort.work.seconds

    @property
    def flops(self) -> float:
        return sum(self._flops.values())

    def encoder_mfu(self, work: Work) -> float:
        """The work's FLOPs as a share of the peak over the time in forward passes, without reading and waiting."""
        return work.flops / self.encoder_flops
