"""Progress of a long task, as metrics and on stderr: one updating line on a terminal, a line every 10 s elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from prefill_jobs.runtime.job_metrics import JobMetrics
from prefill_router.common.console import say
from prefill_router.encoder.prefill_work import Work

_LINE_EVERY_S = 10.0


class Progress:
    """Counts finished rows of `total`, and reports them."""

    def __init__(self, task: str, total: int, unit: str = "prompts") -> None:
        self.task, self.total, self.unit = task, total, unit
        self.rows = self.skipped = 0
        self.work = Work()
        self.capacity_flops = 0.0
        self.metrics = JobMetrics(task)
        self.metrics.begin(total)
        self.started = self.said = time.monotonic()
        self._say(f"{task}: {total:,} {unit}")

    def skip(self, rows: int) -> None:
        """Counts rows done by an earlier run, which do not enter rates or the ETA."""
        self.skipped += rows
        self.metrics.reuse(rows)
        self._say_when_due()

    def add(self, rows: int, work: Work, capacity_flops: float = 0.0, retries: int = 0) -> None:
        """Counts a finished shard. `capacity_flops` is `Capacity.flops` of the run so far."""
        self.rows, self.work, self.capacity_flops = self.rows + rows, self.work + work, capacity_flops
        self.metrics.commit(rows, work.tokens, retries)
        if capacity_flops:
            self.metrics.compute(self.work, self.work.flops / capacity_flops)
        self._say_when_due()

    def quarantine(self, rows: int) -> None:
        """Counts quarantined rows, which are not finished rows."""
        self.metrics.quarantine(rows)

    @property
    def elapsed_s(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def is_complete(self) -> bool:
        return self.rows + self.skipped >= self.total

    def _say_when_due(self) -> None:
        self.metrics.remain(max(0, self.total - self.rows - self.skipped))
        now = time.monotonic()
        if sys.stderr.isatty() or now - self.said >= _LINE_EVERY_S or self.is_complete:
            self.said = now
            self._say(self._line(self.elapsed_s))

    def _line(self, elapsed_s: float) -> str:
        parts = [f"{self.task}: {self.rows + self.skipped:,}/{self.total:,} {self.unit}"]
        if self.skipped:
            parts.append(f"{self.skipped:,} done before")
        if self.work.tokens:
            parts.append(f"{self.rows / elapsed_s:,.1f} prompts/s")
            parts.append(f"{self.work.tokens / elapsed_s:,.0f} tokens/s")
        if self.capacity_flops:
            parts.append(f"{self.work.flops / self.capacity_flops:.0%} of peak")
            parts.append(f"{self.work.padding_waste:.1%} padding")
        if self.is_complete:
            parts.append(f"{elapsed_s:.0f} s")
        elif self.rows:
            remaining_s = elapsed_s / self.rows * (self.total - self.skipped - self.rows)
            parts.append(f"ETA {timedelta(seconds=round(remaining_s))}")
        return " · ".join(parts)

    def _say(self, line: str) -> None:
        if not sys.stderr.isatty():
            say(line)
            return
        sys.stderr.write(f"\r\033[K{line}" + "\n" * self.is_complete)
        sys.stderr.flush()
