"""What operators watch of jobs, as Prometheus has it from Ray's exporter. Every name begins with `prefill_router_`.

A job's driver exports what it is told of its workers' shards, Ray Train's first worker how training goes.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

from prefill_router.common.gauges import KeptGauge
from prefill_router.encoder.prefill_work import Work


class JobMetrics:
    """Of one long task of a job; the label `task` tells which. Gauges are exported as long as it lives."""

    def __init__(self, task: str) -> None:
        self._task = {"task": task}
        self._rows = self._counter("rows", "Rows that were done by this run")
        self._reused = self._counter("reused_rows", "Rows that an earlier run had done")
        self._tokens = self._counter("tokens", "Tokens that the encoder read")
        self._retries = self._counter("retries", "Shards that were begun again, because a worker had ended over them")
        self._quarantined = self._counter("quarantined_rows", "Rows that could not be read")
        self._backlog = self._gauge("backlog_rows", "Rows that are still to be done")
        self._mfu = self._gauge("mfu", "Share of its workers' peak FLOP/s that the run has reached so far")
        self._padding = self._gauge("padding", "Padding's share of what was computed")
        self._last_commit = self._gauge("last_commit_seconds", "When the latest shard was done, or the run began")
        self._running = self._gauge("running", "1 until all rows are done")

    def begin(self, rows: int) -> None:
        self._last_commit.set(time.time())
        self.remain(rows)

    def remain(self, rows: int) -> None:
        self._backlog.set(rows)
        self._running.set(float(rows > 0))

    def reuse(self, rows: int) -> None:
        self._add(self._reused, rows)

    def commit(self, rows: int, tokens: int, retries: int) -> None:
        """A shard that is done."""
        for counter, value in ((self._rows, rows), (self._tokens, tokens), (self._retries, retries)):
            self._add(counter, value)
        self._last_commit.set(time.time())

    def quarantine(self, rows: int) -> None:
        self._add(self._quarantined, rows)

    def compute(self, work: Work, mfu: float) -> None:
        """All work of the run so far."""
        self._mfu.set(mfu)
        self._padding.set(work.padding_waste)

    @staticmethod
    def _add(counter: Counter, value: int) -> None:
        if value > 0:  # Ray refuses to count nothing
            counter.inc(value)

    def _counter(self, name: str, description: str) -> Counter:
        # Ray's exporter ends a counter's name in _total.
        counter = Counter(f"prefill_router_job_{name}", description=description, tag_keys=("task",))
        counter.set_default_tags(self._task)
        return counter

    def _gauge(self, name: str, description: str) -> KeptGauge:
        gauge = Gauge(f"prefill_router_job_{name}", description=description, tag_keys=("task",))
        gauge.set_default_tags(self._task)
        return KeptGauge(gauge)


class TrainMetrics:
    """Of a training, after each epoch."""

    def __init__(self) -> None:
        self._epoch = _gauge("epoch", "Passes over the training prompts")
        self._loss = _gauge("validation_loss", "Mean of the trunks, each at its best epoch so far")

    def epoch(self, number: int, validation_loss: float) -> None:
        self._epoch.set(number)
        self._loss.set(validation_loss)


def _gauge(name: str, description: str) -> KeptGauge:
    return KeptGauge(Gauge(f"prefill_router_train_{name}", description=description))


class CollectMetrics:
    """Of the calls to targets, by target."""

    def __init__(self) -> None:
        self._cost = Counter(
            "prefill_router_collect_cost_usd",
            description="Paid for answers, and at most paid for calls that brought none",
            tag_keys=("target",),
        )
        self._failed = Counter(
            "prefill_router_collect_failed_calls", description="Attempts that brought no answer", tag_keys=("target",)
        )

    def attempt(self, target: str, cost_usd: float, *, is_answered: bool) -> None:
        if cost_usd > 0.0:
            self._cost.inc(cost_usd, tags={"target": target})
        if not is_answered:
            self._failed.inc(1, tags={"target": target})
