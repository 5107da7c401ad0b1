"""`extract`: computes the activations of a corpus, each shard once.

The driver plans the corpus, sends every shard that is not in the commit log to an actor, then the rows that repeat an
earlier prompt, and commits all of them in one manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_jobs.extract.encoder_actor import map_on_encoders
from prefill_jobs.extract.extract_summary import ExtractSummary
from prefill_jobs.extract.extractor import ExtractRequest, ExtractTask, ShardExtractor, Source
from prefill_jobs.option_fields import names_in
from prefill_jobs.options import ExtractConfig
from prefill_jobs.runtime import cluster, ray_tasks
from prefill_jobs.runtime.progress import Progress
from prefill_router import storage
from prefill_router.activations import commit_log
from prefill_router.activations.activation_store import StoreManifest, read_manifest, write_manifest
from prefill_router.activations.commit_log import CommitLog, StoreConflictError
from prefill_router.activations.commit_records import bad_rows, shard_name
from prefill_router.activations.encode_time import SUMMARY, measured_ms
from prefill_router.activations.joined_stores import has_own_store, store_below
from prefill_router.activations.reuse import Sources
from prefill_router.activations.shard_list import ShardList
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import POOLINGS, Pooling
from prefill_router.corpus.plan import CorpusPlan, Repeats, Shard, plan
from prefill_router.corpus.quarantine import write_quarantine
from prefill_router.corpus.reader import refuse_output, report_unread, require_corpus
from prefill_router.encoder import checkpoint
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec, check_encoder
from prefill_router.encoder.sensors import named
from prefill_router.router.artifact import Router
from prefill_router.storage import parquet_objects
from prefill_router.storage.lease import Lease


@dataclass(frozen=True)
class _Job:
    """The extraction of one encoder's store."""

    config: ExtractConfig
    request: ExtractRequest
    encoder: EncoderIdentity | None = None  # if known before it is loaded
    other: str | None = None  # a store from which activations are copied


def extract(config: ExtractConfig) -> dict[str, ExtractSummary]:
    """Writes the activations of a corpus to a store for each encoder, and returns the summaries by the stores' URIs.

    A single encoder's store is at `config.out`, those of several are in folders below. A store's manifest is written
    last. Raises UserError if another encoder wrote a store, or a sole encoder's store is where several are wanted.
    """
    configs = each_encoder(config)
    _check_folder(config.out, len(configs))
    return extract_stores(configs)


def each_encoder(config: ExtractConfig) -> list[ExtractConfig]:
    """The extraction of each encoder to its own store."""
    specs = named(EncoderSpec(model=model) for model in names_in(config.encoder))
    return [
        config.model_copy(update={"encoder": spec.model, "out": store_below(config.out, name)})
        for name, spec in specs.items()
    ]


def extract_stores(configs: Sequence[ExtractConfig], others: Sequence[str] = ()) -> dict[str, ExtractSummary]:
    """Does what `extract` does for configs of one corpus, which may differ in encoder, layers, pooling and out.

    Activations that the stores `others`, one for each config, have are copied from them.
    """
    sources: Sequence[str | None] = others or [None] * len(configs)
    return _extract([_Job(c, _request(c), other=other) for c, other in zip(configs, sources, strict=True)])


def extract_for(router: Router, config: ExtractConfig) -> dict[str, ExtractSummary]:
    """Extracts the columns that a router reads with its encoders, ignoring the encoder and layers of `config`.

    Raises UserError if a store at `config.out` or an encoder that can be loaded differs from the router's encoder.
    """
    _check_folder(config.out, len(router.encoders))
    jobs = []
    for name, identity in router.encoders.items():
        columns = [column.unnamed.name for column in router.columns if column.encoder == name]
        out = store_below(config.out, name)
        request = ExtractRequest(identity.spec, [], [], columns, out, config.max_prompt_bytes)
        jobs.append(_Job(config.model_copy(update={"out": out}), request, identity))
    return _extract(jobs)


def _request(config: ExtractConfig) -> ExtractRequest:
    layers, pooling = parse_layers(config.layers), parse_pooling(config.pooling)
    spec = EncoderSpec(
        model=config.encoder,
        max_tokens=config.max_tokens,
        mean_over=config.mean_over,
        template_arguments=config.template_arguments,
        template_date=config.template_date,
    )
    return ExtractRequest(spec, layers, pooling, [], config.out, config.max_prompt_bytes)


def _extract(jobs: Sequence[_Job]) -> dict[str, ExtractSummary]:
    """Extracts one store after another, each on all workers. Checks all of them first."""
    config = jobs[0].config
    require_corpus(config.corpus)
    for job in jobs:
        _check(job)
    report_unread(config.corpus, "extract")
    with cluster.connected(), ExitStack() as held:
        planned = plan(config.corpus, config.shard_rows, config.limit, config.max_prompt_bytes, spread=ray_tasks.spread)
        planned.check_bad(planned.bad, config.max_bad_fraction)
        leases = [held.enter_context(Lease.acquire(job.config.out, "extract")) for job in jobs]
        summaries = {}
        for job, lease in zip(jobs, leases, strict=True):
            if len(jobs) > 1:
                say(f"extract: encoder {job.request.encoder.model} to {job.config.out}")
            if job.encoder is not None:
                commit_log.claim_encoder(job.config.out, job.encoder)
            summaries[job.config.out] = _Extraction(job.config, planned, job.request, lease, job.other).run()
        return summaries


def _check_folder(out: str, num_encoders: int) -> None:
    """Raises UserError if readers of the folder would take a sole encoder's store there for the whole extraction."""
    if num_encoders > 1 and has_own_store(out):
        raise UserError(f"{out}: has the store of a single encoder: choose another folder for several encoders")


def _check(job: _Job) -> None:
    config, request = job.config, job.request
    refuse_output(config.out, config.corpus)
    if job.encoder is None or read_manifest(config.out) is None:  # a finished store may need no encoder at all
        check_encoder(request.encoder, [] if request.layers == "all" else request.layers)
    is_default = request.layers == "all" and request.pooling == list(POOLINGS)
    if job.encoder is None and not is_default and checkpoint.is_sentence_model(request.encoder.model):
        say(f"extract: {request.encoder.model} is a sentence encoder: --layers and --pooling do not apply to it")


class _Extraction:
    def __init__(
        self, config: ExtractConfig, planned: CorpusPlan, request: ExtractRequest, lease: Lease, other: str | None
    ) -> None:
        self.config, self.plan, self.lease = config, planned, lease
        if config.overwrite:
            commit_log.clear(config.out)
        self.other = None if other is None else CommitLog.open(other)
        if self.other is not None and self.other.encoder is not None:
            commit_log.claim_encoder(config.out, self.other.encoder)
        self.commit_log = CommitLog.open(config.out)
        before = read_manifest(config.out)
        if before is not None:
            _check_nothing_is_lost(config.out, before, self.commit_log, self.plan)
        self.request = request if before is None else replace(request, also=[*request.also, *before.columns])
        self.encoder = self.commit_log.encoder
        self.parts: list[Shard | Repeats] = [*planned.shards, *planned.repeats]

    def run(self) -> ExtractSummary:
        # Downloads before the actors start, so that no actor occupies a GPU meanwhile.
        spec = self.request.encoder
        with doing(f"downloading encoder {spec.model} to every node"):
            ray_tasks.run_on_every_node(checkpoint.fetch, spec.model, spec.revision)
        self.workers = self.actors.number
        summary = ExtractSummary(len(self.plan.bad), self.workers)
        if self.plan.num_repeated:
            say(f"extract: {self.plan.num_repeated:,} prompts repeat an earlier one and are computed once")
        if self.plan.bad:
            say(f"extract: {len(self.plan.bad):,} invalid rows go to the quarantine; {self.plan.bad[0].message}")
        num_rows = self.plan.num_rows - len(self.plan.bad)
        with Progress("extract", num_rows, at_once=self.workers).shown() as progress:
            progress.quarantine(len(self.plan.bad))
            self._do(self.plan.shards, self._shard_tasks, progress, summary)
            self._do(self.plan.repeats, self._repeat_tasks, progress, summary)
        with doing("writing the manifest"):
            return self._finish(summary)

    @property
    def actors(self) -> cluster.Actors:
        config = self.config
        return cluster.Actors(config.workers, config.gpus_per_worker, config.accelerator, config.memory_per_worker)

    def _shard_tasks(self, pending: Sequence[int]) -> list[ExtractTask]:
        """A task per pending shard, with the finished shards that have some of its prompts."""
        digests = [part.digest for part in self.parts]
        logs = [self.commit_log, *([] if self.other is None else [self.other])]
        sources = [(held.uri, Sources(held, digests)) for held in logs]
        spans = list(self.plan.spans())

        def sources_of(i: int) -> tuple[Source, ...]:
            keys = self.plan.keys[spans[i][1]]
            return tuple((store, place) for store, found in sources for place in found.of(i, keys))

        return [ExtractTask(spans[i][0], sources_of(i)) for i in pending]

    def _repeat_tasks(self, pending: Sequence[int]) -> list[ExtractTask]:
        places = self.commit_log.places(self._positions(self.plan.shards))
        repeats = [self.plan.repeats[i] for i in pending]
        out = self.config.out
        return [ExtractTask(rows, tuple((out, places[i]) for i in dict.fromkeys(rows.sources))) for rows in repeats]

    def _names(self, parts: Sequence[Shard | Repeats]) -> list[str]:
        assert self.encoder is not None
        columns = [column.name for column in self.request.columns(self.encoder)]
        return [shard_name(part.digest, columns) for part in parts]

    def _positions(self, parts: Sequence[Shard | Repeats]) -> NDArray[np.int64]:
        """The positions of the parts' records in the commit log; -1 for parts without a record."""
        return np.full(len(parts), -1) if self.encoder is None else self.commit_log.positions(self._names(parts))

    def _do(
        self,
        parts: Sequence[Shard | Repeats],
        to_tasks: Callable[[Sequence[int]], list[ExtractTask]],
        progress: Progress,
        summary: ExtractSummary,
    ) -> None:
        """Runs the parts that are not in the commit log on the actors, and adds their records to it."""
        positions = self._positions(parts)
        done = self.commit_log.records.take(positions[positions >= 0])
        num_rows, num_refused = pc.sum(done["rows"], min_count=0).as_py(), sum(1 for _ in bad_rows(done))
        summary.reuse(num_rows, num_refused)
        progress.skip(num_rows + num_refused)
        pending = np.flatnonzero(positions < 0).tolist()
        if not pending:
            return
        create = partial(ShardExtractor, self.request)
        for finished in map_on_encoders(create, to_tasks(pending), self.actors, progress):
            self.lease.check()
            self._check_encoder(finished.encoder)
            self.commit_log.add(finished.record)
            summary.add(finished)
            num_refused = len(finished.record.refused)
            effort = finished.effort
            progress.add(finished.record.rows + num_refused, effort.work, summary.capacity, effort.num_retries)
            progress.quarantine(num_refused)

    def _check_encoder(self, encoder: EncoderIdentity) -> None:
        if self.encoder is None:
            self.encoder = encoder
        if encoder.fingerprint != self.encoder.fingerprint:
            raise UserError(
                "the workers loaded different encoders (weights, tokenizer or dtype): install the same on every node"
            )

    def _finish(self, summary: ExtractSummary) -> ExtractSummary:
        records = self.commit_log.records.take(self._positions(self.parts))
        bad = [*self.plan.bad, *bad_rows(records)]
        self.plan.check_bad(bad, self.config.max_bad_fraction)
        assert self.encoder is not None
        manifest = StoreManifest(
            encoder=self.encoder,
            columns=[column.name for column in self.request.columns(self.encoder)],
            corpus=self.config.corpus,
            is_sample=self.config.limit is not None,
            shards=ShardList(records.filter(pc.is_valid(records["file"]))),
            quarantine=write_quarantine(self.config.out, bad),
        )
        self.lease.check()
        write_manifest(self.config.out, manifest)
        self.commit_log.tidy(self._names(self.parts))
        summary.finish(manifest, measured_ms(self.config.out))
        storage.write_json(storage.join(self.config.out, SUMMARY), summary.to_dict())
        return summary


def _check_nothing_is_lost(out: str, before: StoreManifest, log: CommitLog, planned: CorpusPlan) -> None:
    """Raises StoreConflictError if the finished store has rows that the corpus lacks now: a run only adds rows."""
    parts: list[Shard | Repeats] = [*planned.shards, *planned.repeats]
    stay = pa.array(parquet_objects.file_name(shard_name(part.digest, before.columns)) for part in parts)
    others = before.shards.table.filter(pc.invert(pc.is_in(before.shards.table["file"], value_set=stay)))
    if not len(others):
        return
    positions = log.positions(others["file"].combine_chunks(), "file")
    lost = _num_lost(log, positions[positions >= 0], planned)
    for file, rows, position in zip(others["file"].to_pylist(), others["rows"].to_pylist(), positions, strict=True):
        if num_lost := lost.get(position, rows):
            raise StoreConflictError(
                f"{out}: {num_lost:,} rows of shard {file}, extracted from {before.corpus}, are missing or changed in "
                "this corpus: choose another --out, or replace the store with extract --overwrite"
            )


def _num_lost(log: CommitLog, positions: NDArray[np.int64], planned: CorpusPlan) -> dict[int, int]:
    """Counts the rows of each of these records that the corpus lacks."""
    held = dict(log.keys(positions))
    is_lost = ~planned.has(np.concatenate([np.zeros((0, 3), np.uint64), *held.values()]))
    parts = np.split(is_lost, np.cumsum([len(keys) for keys in held.values()]))
    return {position: int(part.sum()) for position, part in zip(held, parts, strict=False)}


def parse_layers(text: str) -> Literal["all"] | list[int]:
    if text.strip() == "all":
        return "all"
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f'layers = "{text}", must be "all" or indices like 0,15,30') from None


def parse_pooling(text: str) -> list[Pooling]:
    names = [name.strip() for name in text.split(",")]
    chosen = [pooling for pooling in POOLINGS if pooling in names]
    for name in names:
        if name not in chosen:
            raise UserError(f'pooling = "{name}", must be last, mean or both, as last,mean')
    return chosen
