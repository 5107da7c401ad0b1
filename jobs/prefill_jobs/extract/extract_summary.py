"""Counts of an extraction, summed over its shards and written as JSON at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prefill_jobs.extract.extractor import ExtractResult
from prefill_jobs.runtime.capacity import Capacity
from prefill_router.activations.activation_store import StoreManifest
from prefill_router.activations.encode_time import ENCODE_MS
from prefill_router.encoder.prefill_work import Work


class ExtractSummary:
    """Counts of one run. `manifest` is set by `finish`."""

    manifest: StoreManifest
    encode_ms: float | None

    def __init__(self, num_bad: int, workers: int) -> None:
        self.num_quarantined, self.workers = num_bad, workers
        self.work = Work()
        self.num_reused = self.num_copied = self.num_retries = self.num_shards_computed = 0
        self.seconds = 0.0
        self.capacity = Capacity()
        self._started = time.monotonic()

    def reuse(self, num_rows: int, num_refused: int) -> None:
        """Counts rows done by an earlier run."""
        self.num_reused += num_rows
        self.num_quarantined += num_refused

    def add(self, done: ExtractResult) -> None:
        self.capacity.add(done.effort)
        self.num_retries += done.effort.num_retries
        if not done.is_new:
            self.reuse(done.record.rows, len(done.record.refused))
            return
        self.num_shards_computed += 1
        self.work += done.effort.work
        self.num_copied += done.num_copied
        self.num_quarantined += len(done.record.refused)

    def finish(self, manifest: StoreManifest, before_ms: float | None) -> None:
        """Ends the run. `before_ms` is what an earlier one measured, for one that computes nothing."""
        self.manifest, self.seconds = manifest, time.monotonic() - self._started
        self.encode_ms = 1000.0 * self.work.seconds / self.work.prompts if self.work.prompts else before_ms

    def to_dict(self) -> Mapping[str, Any]:
        """The summary as JSON values.

        `tokens_per_s` is over the whole job. `mfu` is `Capacity.encoder_mfu`, which the progress shows.
        `peak_flops` is the workers' peak per second, averaged over the whole job. `encode_ms` is a prompt's time in
        the encoder of one worker, in milliseconds.
        """
        return {
            "prompts": self.manifest.rows,
            "computed": self.work.prompts,
            "reused": self.num_reused,
            "copied": self.num_copied,
            "quarantined": self.num_quarantined,
            "tokens": self.work.tokens,
            "computed_tokens": self.work.computed_tokens,
            "padding_waste": round(self.work.padding_waste, 4),
            "clamped": self.work.clamped,
            "flops": self.work.flops,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.work.tokens / self.seconds, 1),
            "encoder_seconds": round(self.work.seconds, 3),
            ENCODE_MS: None if self.encode_ms is None else round(self.encode_ms, 3),
            "peak_flops": self.capacity.flops / self.seconds,
            "mfu": round(self.capacity.encoder_mfu(self.work), 4) if self.work.seconds else None,
            "shards": len(self.manifest.shards),
            "shards_computed": self.num_shards_computed,
            "bytes": self.manifest.shards.total("bytes"),
            "retries": self.num_retries,
            "workers": self.workers,
        }
