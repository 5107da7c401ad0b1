"""Progress of long tasks on stderr, by `console`'s live line, and of those that encode or call as metrics too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from prefill_jobs.runtime.capacity import Capacity
from prefill_jobs.runtime.job_metrics import JobMetrics
from prefill_router.common.console import doing, say
from prefill_router.common.task_pace import TaskPace
from prefill_router.encoder.prefill_work import Work

_SHORT_S = 1.0  # a task that took less is not worth a line
_MEASURABLE_S = 1.0  # in forward passes: the first ones are slower, so that a share of the peak says nothing before

T = TypeVar("T")


def counted(items: Iterable[T], task: str, total: int, unit: str) -> Iterator[T]:
    """Yields items as they come, and says how many of `total` have come."""
    pace = TaskPace(total)
    with doing(lambda: f"{task}: {pace.done} {unit} · {pace.eta or f'{pace.elapsed_s:.0f} s'}"):
        for item in items:
            pace.add(1)
            yield item


class Progress:
    """Counts finished rows of `total`, and reports them.

    `at_once` shards are done at the same time. `start` says what happens before the first one is done.
    """

    def __init__(
        self, task: str, total: int, unit: str = "prompts", *, at_once: int = 1, start: str = "starting workers"
    ) -> None:
        self.task, self.unit = task, unit
        self.start: Callable[[], str] = lambda: start
        self.pace = TaskPace(total, at_once)
        self.work = Work()
        self.capacity: Capacity | None = None
        self.metrics = JobMetrics(task)
        self.metrics.begin(total)

    @contextmanager
    def shown(self) -> Iterator[Self]:
        """Shows the progress until the block ends, and then says what the rows took, unless that was short."""
        with doing(self._line):
            yield self
        if self.pace.elapsed_s >= _SHORT_S:
            say(self._line())

    def skip(self, rows: int) -> None:
        """Counts rows done by an earlier run, which do not enter rates or the ETA."""
        self.pace.skip(rows)
        self.metrics.reuse(rows)
        self.metrics.remain(self.pace.left)

    def add(self, rows: int, work: Work, capacity: Capacity | None = None, retries: int = 0) -> None:
        """Counts a finished shard. `capacity` is that of the run so far."""
        self.pace.add(rows)
        self.work, self.capacity = self.work + work, capacity
        self.metrics.commit(rows, work.tokens, retries)
        if capacity and capacity.flops:
            self.metrics.compute(self.work, self.work.flops / capacity.flops)
        self.metrics.remain(self.pace.left)

    def quarantine(self, rows: int) -> None:
        """Counts quarantined rows, which are not finished rows."""
        self.metrics.quarantine(rows)

    def _line(self) -> str:
        """The counts and rates so far. Those of finished rows are means over the whole time, with its start."""
        pace, work = self.pace, self.work
        parts = [f"{self.task}: {pace.done} {self.unit}"]
        if pace.skipped:
            parts.append(f"{pace.skipped:,} done before")
        if not pace.rows and pace.left:
            parts.append(f"{self.start()} ({pace.elapsed_s:.0f} s)")
        rate = pace.rows_per_s if pace.left else pace.rows / pace.elapsed_s
        if work.tokens and rate:
            parts.append(f"{rate:,.1f} prompts/s")
            parts.append(f"{rate * work.tokens / pace.rows:,.0f} tokens/s")
        if self.capacity and work.prompts:
            if work.seconds >= _MEASURABLE_S:
                parts.append(f"encoder at {self.capacity.encoder_mfu(work):.0%} of the hardware's peak")
            parts.append(f"{work.padding_waste:.1%} padding")
        if not pace.left:
            parts.append(f"{pace.elapsed_s:.0f} s")
        elif pace.eta:
            parts.append(pace.eta)
        return " · ".join(parts)
