"""The actor of `extract`: writes the activations and the commit record of one shard at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from prefill_jobs.extract.encoder_actor import EncoderActor
from prefill_jobs.runtime.capacity import Effort
from prefill_jobs.runtime.shared_objects import Shared
from prefill_jobs.runtime.worker_notes import WorkerNote
from prefill_router.activations import commit_log
from prefill_router.activations.commit_log import RecordLocation
from prefill_router.activations.commit_records import Commit, shard_name
from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.common.schema import ActivationColumn, Pooling
from prefill_router.corpus.plan import Repeats, Shard
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.sensors import Sensor, load_sensor

Source = tuple[str, RecordLocation]  # a store's URI, and the location of a shard's record in it


@dataclass(frozen=True)
class ExtractTask:
    """A shard to extract, and finished shards that have some of its activations."""

    rows: Shard | Repeats
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class ExtractResult:
    """A finished shard, written by this task or found finished."""

    record: Commit
    encoder: EncoderIdentity
    effort: Effort
    num_copied: int
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
        return sorted(wanted)


class ShardExtractor(EncoderActor):
    """Extracts the activations of shards."""

    def __init__(self, request: ExtractRequest, threads: int, attempts: Shared, note: WorkerNote) -> None:
        super().__init__(threads, attempts, note)
        self.request = request

    def __call__(self, task: ExtractTask) -> ExtractResult:
        attempt = self.begin(task.rows.digest)
        self.load_encoders()
        columns = self.columns
        record = commit_log.find(self.request.out, shard_name(task.rows.digest, [c.name for c in columns]))
        if record is not None:
            return ExtractResult(record, self.encoder.identity, self.effort(Work(), attempt), record.rows, is_new=False)
        builder = self._builder(task.rows, columns)
        for store, place in task.sources:
            builder.copy(store, place)
        num_copied = builder.num_complete
        work = self.guarded_encoders[""].complete(builder, attempt)
        record = builder.commit(self.request.out)
        return ExtractResult(record, self.encoder.identity, self.effort(work, attempt), num_copied, is_new=True)

    def _builder(self, rows: Shard | Repeats, columns: list[ActivationColumn]) -> ShardBuilder:
        if isinstance(rows, Repeats):
            return ShardBuilder.of_repeats(rows, columns)
        return ShardBuilder.of_shard(rows, columns, self.request.max_prompt_bytes)

    @property
    def sensors(self) -> dict[str, Sensor]:
        return {"": self.encoder}

    @cached_property
    def encoder(self) -> Sensor:
        encoder = load_sensor(self.request.encoder)
        commit_log.claim_encoder(self.request.out, encoder.identity)
        return encoder

    @cached_property
    def columns(self) -> list[ActivationColumn]:
        return self.request.columns(self.encoder.identity)
