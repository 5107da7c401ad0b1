"""What the workers of a job could have computed while they worked: what they did is a share of it."""

from __future__ import annotations

from prefill_router.encoder.prefill_work import Work


class Capacity:
    """A worker counts from its first task to the last in which its encoder ran.

    So one that has ended, waits for its first task or only copies adds nothing, and its successor takes its place.
    """

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}
        self.encoder_flops = 0.0  # that could have been done within the forward passes alone

    def add(self, worker: str, peak_flops: float, worked_s: float, work: Work) -> None:
        """`worked_s` has passed since the worker's first task began; `peak_flops` is what it can reach in a second."""
        if work.prompts:
            self._flops[worker] = max(self._flops.get(worker, 0.0), peak_flops * worked_s)
            self.encoder_flops += peak_flops * work.seconds

    @property
    def flops(self) -> float:
        return sum(self._flops.values())
