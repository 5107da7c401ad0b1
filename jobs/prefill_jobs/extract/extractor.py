"""The actor of `extract`: writes the activations and the commit record of one shard at a time."""

from __future__ import annotations

import os
import pickle
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from prefill_jobs.extract.guarded_encoder import SafeReader, begin
from prefill_jobs.runtime import cluster
from prefill_router.activations import commit_log
from prefill_router.activations.commit_log import RecordLocation
from prefill_router.activations.commit_records import Commit, shard_name
from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.common.schema import POOLINGS, ActivationColumn, Pooling
from prefill_router.corpus.plan import Repeats, Shard
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.hardware import measured_peak_flops
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefill_work import Work

Source = tuple[str, RecordLocation]  # a store's URI, and the location of a shard's record in it


@dataclass(frozen=True)
class Task:
    """A shard to extract, and finished shards that have some of its activations."""

    rows: Shard | Repeats
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class ExtractedShard:
    """A finished shard, written by this task or found finished."""

    record: Commit
    encoder: EncoderIdentity
    work: Work
    num_copied: int
    num_retries: int
    worker: str
    peak_flops: float
    worked_s: float  # since the worker's first task began
    is_new: bool


@dataclass(frozen=True)
class ExtractRequest:
    """What to extract, the same for every shard."""

    encoder: EncoderSpec
    layers: Literal["all"] | list[int]  # combined with every pooling; empty if `also` has all columns
    pooling: list[Pooling]
    also: list[str]  # further columns, such as those that the store has already and keeps
    out: str
    max_prompt_bytes: int

    def columns(self, encoder: EncoderIdentity) -> list[ActivationColumn]:
        wanted = set(map(ActivationColumn.parse, self.also))
        if self.layers:
            wanted.update(encoder.columns(self.layers, self.pooling))
        return sorted(wanted, key=lambda column: (POOLINGS.index(column.pooling), column.layer))


class ExtractShard:
    """Calls overlap: while one shard is in the encoder, the next one is read and the previous one is written."""

    def __init__(self, request: ExtractRequest, threads: int, attempts: cluster.Shared) -> None:
        self.request, self.attempts = request, attempts
        self.threads = min(threads, os.cpu_count() or 1)
        self.worker = cluster.worker_id()
        self._loading = threading.Lock()

    @cached_property
    def began_s(self) -> float:
        """Start time of the first task."""
        return time.monotonic()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        _ = self.began_s
        torch.set_num_threads(self.threads)  # of the thread that calls
        done = self.extract(pickle.loads(row["task"]))
        return {"done": pickle.dumps(done)}

    def extract(self, task: Task) -> ExtractedShard:
        attempt = begin(self.attempts, task.rows.digest)
        with self._loading:
            columns, _ = self.columns, self.peak_flops  # measured while no other task runs
        record = commit_log.find(self.request.out, shard_name(task.rows.digest, [c.name for c in columns]))
        if record is not None:
            return self._done(record, Work(), record.rows, attempt, is_new=False)
        draft = self._draft(task.rows, columns)
        for store, place in task.sources:
            draft.copy(store, place)
        num_copied = draft.num_complete
        work = self.reader.complete(draft, attempt)
        return self._done(draft.commit(self.request.out), work, num_copied, attempt, is_new=True)

    def _draft(self, rows: Shard | Repeats, columns: list[ActivationColumn]) -> ShardBuilder:
        if isinstance(rows, Repeats):
            return ShardBuilder.of_repeats(rows, columns)
        return ShardBuilder.of_shard(rows, columns, self.request.max_prompt_bytes)

    @cached_property
    def encoder(self) -> PrefillEncoder:
        encoder = PrefillEncoder.load(self.request.encoder)
        commit_log.claim_encoder(self.request.out, encoder.identity)
        return encoder

    @cached_property
    def columns(self) -> list[ActivationColumn]:
        return self.request.columns(self.encoder.identity)

    @cached_property
    def peak_flops(self) -> float:
        return measured_peak_flops(self.encoder.device, self.encoder.dtype)

    @cached_property
    def reader(self) -> SafeReader:
        return SafeReader(self.encoder, self.threads)

    def _done(self, record: Commit, work: Work, num_copied: int, attempt: int, *, is_new: bool) -> ExtractedShard:
        return ExtractedShard(
            record=record,
            encoder=self.encoder.identity,
            work=work,
            num_copied=num_copied,
            num_retries=attempt - 1,
            worker=self.worker,
            peak_flops=self.peak_flops,
            worked_s=time.monotonic() - self.began_s,
            is_new=is_new,
        )
