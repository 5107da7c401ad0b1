"""What operators watch of jobs, as Prometheus has it from Ray's exporter. Every name begins with `prefill_router_`.

A job's driver exports what it is told of its workers' shards, Ray Train's first worker how training goes.
"""

from __future__ import annotations

import threading
import time
import weakref

from ray.util.metrics import Counter, Gauge

from prefill_router.work import Work

# Ray's exporter forgets a gauge that was not set for two of its reports, 20 s: a job that stands still would be seen no
# more, and no alert would say that it does.
_TELL_EVERY_S = 5.0


class JobMetrics:
    """Of one long task of a job; the label `task` tells which. Gauges are told as long as it lives."""

    def __init__(self, task: str) -> None:
        self._task = {"task": task}
        self._values: dict[Gauge, float] = {}
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
        threading.Thread(target=_tell, args=(weakref.ref(self),), daemon=True).start()

    def begin(self, rows: int) -> None:
        self._set(self._last_commit, time.time())
        self.remain(rows)

    def remain(self, rows: int) -> None:
        self._set(self._backlog, rows)
        self._set(self._running, float(rows > 0))

    def reuse(self, rows: int) -> None:
        self._add(self._reused, rows)

    def commit(self, rows: int, tokens: int, retries: int) -> None:
        """A shard that is done."""
        for counter, value in ((self._rows, rows), (self._tokens, tokens), (self._retries, retries)):
            self._add(counter, value)
        self._set(self._last_commit, time.time())

    def quarantine(self, rows: int) -> None:
        self._add(self._quarantined, rows)

    def compute(self, work: Work, mfu: float) -> None:
        """All work of the run so far."""
        self._set(self._mfu, mfu)
        self._set(self._padding, work.padding_waste)

    def tell(self) -> None:
        """Sets all gauges to what they are."""
        for gauge, value in list(self._values.items()):
            gauge.set(value)

    def _set(self, gauge: Gauge, value: float) -> None:
        self._values[gauge] = value
        gauge.set(value)

    @staticmethod
    def _add(counter: Counter, value: int) -> None:
        if value > 0:  # Ray refuses to count nothing
            counter.inc(value)

    def _counter(self, name: str, description: str) -> Counter:
        # Ray's exporter ends a counter's name in _total.
        counter = Counter(f"prefill_router_job_{name}", description=description, tag_keys=("task",))
        counter.set_default_tags(self._task)
        return counter

    def _gauge(self, name: str, description: str) -> Gauge:
        gauge = Gauge(f"prefill_router_job_{name}", description=description, tag_keys=("task",))
        gauge.set_default_tags(self._task)
        return gauge


def _tell(of: weakref.ref[JobMetrics]) -> None:
    while (metrics := of()) is not None:
        metrics.tell()
        del metrics  # or it would live as long as this thread
        time.sleep(_TELL_EVERY_S)


class TrainMetrics:
    """Of a training, after each epoch."""

    def __init__(self) -> None:
        self._epoch = Gauge("prefill_router_train_epoch", description="Passes over the training prompts")
        self._loss = Gauge(
            "prefill_router_train_validation_loss", description="Mean of the trunks, each at its best epoch so far"
        )

    def epoch(self, number: int, validation_loss: float) -> None:
        self._epoch.set(number)
        self._loss.set(validation_loss)


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
