"""Prometheus metrics of jobs, exported by Ray. Every name begins with `prefill_router_`.

The job's driver exports shard counts and rates; the rank-0 worker of Ray Train exports training metrics.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

from prefill_router.common.gauges import KeptGauge
from prefill_router.encoder.prefill_work import Work


class JobMetrics:
    """Metrics of one long task of a job, with the label `task`. Gauges are exported while this object lives."""

    def __init__(self, task: str) -> None:
        self._task = {"task": task}
        self._rows = self._counter("rows", "Rows processed by this run")
        self._reused = self._counter("reused_rows", "Rows reused from an earlier run")
        self._tokens = self._counter("tokens", "Tokens read by the encoder")
        self._retries = self._counter("retries", "Shards retried because a worker crashed")
        self._quarantined = self._counter("quarantined_rows", "Quarantined rows")
        self._backlog = self._gauge("backlog_rows", "Rows still to be processed")
        self._mfu = self._gauge("mfu", "FLOPs as a share of the workers' peak since their first tasks, with reading")
        self._padding = self._gauge("padding", "Share of computed tokens that are padding")
        self._last_commit = self._gauge("last_commit_seconds", "Unix time of the last commit, or of the run's start")
        self._running = self._gauge("running", "1 until all rows are processed, then 0")

    def begin(self, rows: int) -> None:
        self._last_commit.set(time.time())
        self.remain(rows)

    def remain(self, rows: int) -> None:
        self._backlog.set(rows)
        self._running.set(float(rows > 0))

    def reuse(self, rows: int) -> None:
        self._add(self._reused, rows)

    def commit(self, rows: int, tokens: int, retries: int) -> None:
        """Counts a finished shard."""
        for counter, value in ((self._rows, rows), (self._tokens, tokens), (self._retries, retries)):
            self._add(counter, value)
        self._last_commit.set(time.time())

    def quarantine(self, rows: int) -> None:
        self._add(self._quarantined, rows)

    def compute(self, work: Work, mfu: float) -> None:
        """Sets the gauges from all work of the run so far."""
        self._mfu.set(mfu)
        self._padding.set(work.padding_waste)

    @staticmethod
    def _add(counter: Counter, value: int) -> None:
        if value > 0:  # Ray rejects an increment of 0
            counter.inc(value)

    def _counter(self, name: str, description: str) -> Counter:
        # Ray's exporter appends _total to a counter's name.
        counter = Counter(f"prefill_router_job_{name}", description=description, tag_keys=("task",))
        counter.set_default_tags(self._task)
        return counter

    def _gauge(self, name: str, description: str) -> KeptGauge:
        gauge = Gauge(f"prefill_router_job_{name}", description=description, tag_keys=("task",))
        gauge.set_default_tags(self._task)
        return KeptGauge(gauge)


class TrainMetrics:
    """Metrics of a training run, set after each epoch."""

    def __init__(self) -> None:
        self._epoch = _gauge("epoch", "Completed passes over the training prompts")
        self._loss = _gauge("validation_loss", "Mean validation loss of the trunks, each at its best epoch so far")

    def epoch(self, number: int, validation_loss: float) -> None:
        self._epoch.set(number)
        self._loss.set(validation_loss)


def _gauge(name: str, description: str) -> KeptGauge:
    return KeptGauge(Gauge(f"prefill_router_train_{name}", description=description))


class CollectMetrics:
    """Metrics of the calls to targets, labelled by target."""

    def __init__(self) -> None:
        self._cost = Counter(
            "prefill_router_collect_cost_usd",
            description="Cost of answers in USD, plus an upper bound for failed calls",
            tag_keys=("target",),
        )
        self._failed = Counter(
            "prefill_router_collect_failed_calls", description="Failed attempts", tag_keys=("target",)
        )

    def attempt(self, target: str, cost_usd: float, *, is_answered: bool) -> None:
        if cost_usd > 0.0:
            self._cost.inc(cost_usd, tags={"target": target})
        if not is_answered:
            self._failed.inc(1, tags={"target": target})
