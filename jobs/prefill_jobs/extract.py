"""`extract`: corpus to activations, each shard once.

Plan the corpus, hand every shard that the ledger does not know to an actor, then those rows that repeat an earlier
prompt, and commit them all in one manifest.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from prefill_jobs import cluster
from prefill_jobs.extractor import Done, ExtractShard, Request, Task
from prefill_jobs.progress import Progress
from prefill_jobs.reader import Attempts
from prefill_jobs.summary import ExtractSummary
from prefill_router import checkpoint, ledger, shards, storage
from prefill_router.config import ExtractConfig
from prefill_router.console import say
from prefill_router.encoder import EncoderIdentity, EncoderSpec
from prefill_router.errors import UserError
from prefill_router.features import Manifest, read_manifest, write_manifest
from prefill_router.lease import Lease
from prefill_router.ledger import Commit, Ledger, shard_name
from prefill_router.plan import CorpusPlan, Repeats, Shard, plan, row_keys
from prefill_router.schema import POOLINGS, Pooling

_CALLS = 3  # of an actor at a time: one shard is read, one is in the encoder, one is written


def extract(config: ExtractConfig) -> ExtractSummary:
    """Writes the activations of a corpus to `config.out` and returns what that took. The manifest is written last."""
    layers, pooling = parse_layers(config.layers), parse_pooling(config.pooling)
    storage.refuse_file(config.out)
    planned = plan(config.corpus, config.shard_rows, config.limit, config.max_prompt_bytes)
    planned.check_bad(planned.bad, config.max_bad_fraction)
    with Lease.acquire(config.out, "extract") as lease:
        extraction = _Extraction(config, planned, layers, pooling, lease)
        with cluster.connected():
            return extraction.run()


class _Extraction:
    def __init__(
        self,
        config: ExtractConfig,
        planned: CorpusPlan,
        layers: Literal["all"] | list[int],
        pooling: list[Pooling],
        lease: Lease,
    ) -> None:
        self.config, self.plan, self.lease = config, planned, lease
        if config.overwrite:
            ledger.clear(config.out)
        self.ledger = Ledger.open(config.out)
        before = read_manifest(config.out)
        if before is not None:
            _check_nothing_is_lost(config.out, before, self.ledger, self.plan)
        spec = EncoderSpec(model=config.encoder, max_tokens=config.max_tokens, mean_over=config.mean_over)
        also = [] if before is None else before.columns
        self.request = Request(spec, layers, pooling, also, config.out, config.max_prompt_bytes)
        self.records: dict[str, Commit] = {}  # by the digest of the rows
        self.encoder = self.ledger.encoder

    def run(self) -> ExtractSummary:
        # Apart from the workers' loading, so that none holds a GPU while its machine downloads.
        cluster.on_every_node(checkpoint.fetch, self.config.encoder)
        self.workers = self.actors.number
        summary = ExtractSummary(len(self.plan.bad), self.workers)
        progress = Progress("extract", self.plan.num_rows - len(self.plan.bad))
        progress.quarantine(len(self.plan.bad))
        if self.plan.num_repeated:
            say(f"extract: {self.plan.num_repeated:,} prompts repeat an earlier one: they are computed once")
        if self.plan.bad:
            say(f"extract: {len(self.plan.bad):,} rows are bad and go to the quarantine; {self.plan.bad[0].message}")
        self._do(self._tasks(), progress, summary)
        self._do(self._repeat_tasks(), progress, summary)
        return self._finish(summary)

    @property
    def actors(self) -> cluster.Actors:
        config = self.config
        return cluster.Actors(config.workers, config.gpus_per_worker, config.accelerator, config.memory_per_worker)

    def _tasks(self) -> list[Task]:
        """The shards that are not done, each with the finished ones that hold some of its prompts."""
        tasks = []
        for shard, rows in self.plan.spans():
            keys = self.plan.keys[rows]
            sources = self.ledger.sources(keys) if self.ledger.commits and self._record(shard.digest) is None else []
            tasks.append(Task(shard, tuple(sources)))
        return tasks

    def _repeat_tasks(self) -> list[Task]:
        names = {i: self.records[shard.digest].name for i, shard in enumerate(self.plan.shards)}
        return [Task(repeats, tuple(dict.fromkeys(names[i] for i in repeats.sources))) for repeats in self.plan.repeats]

    def _record(self, digest: str) -> Commit | None:
        if self.encoder is None:
            return None
        names = [column.name for column in self.request.columns(self.encoder)]
        return self.ledger.commits.get(shard_name(digest, names))

    def _do(self, tasks: Sequence[Task], progress: Progress, summary: ExtractSummary) -> None:
        pending = []
        for task in tasks:
            record = self._record(task.rows.digest)
            if record is None:
                pending.append(task)
            else:
                self.records[task.rows.digest] = record
                summary.reuse(record)
                progress.skip(len(record.row_keys) + len(record.refused))
        if not pending:
            return
        arguments = {
            "request": self.request,
            "threads": cluster.threads_per_worker(self.workers),
            "attempts": Attempts.remote(),  # type: ignore[attr-defined]
        }
        items = [{"digest": task.rows.digest, "task": pickle.dumps(task)} for task in pending]
        options = self.actors.options(_CALLS)
        for row in cluster.map_rows(items, ExtractShard, fn_constructor_kwargs=arguments, **options):
            done: Done = pickle.loads(row["done"])
            self.lease.check()
            self._check_encoder(done.encoder)
            self.records[row["digest"]] = done.record
            summary.add(done)
            rows = len(done.record.row_keys) + len(done.record.refused)
            progress.add(rows, done.work, summary.peak_flops, done.num_retries)
            progress.quarantine(len(done.record.refused))

    def _check_encoder(self, encoder: EncoderIdentity) -> None:
        if self.encoder is None:
            self.encoder = encoder
        if encoder.fingerprint != self.encoder.fingerprint:
            raise UserError("the workers' encoders differ (weights, tokenizer or dtype): give every node the same")

    def _finish(self, summary: ExtractSummary) -> ExtractSummary:
        parts: list[Shard | Repeats] = [*self.plan.shards, *self.plan.repeats]
        records = [self.records[rows.digest] for rows in parts]
        bad = [*self.plan.bad, *(refused.to_bad_row() for record in records for refused in record.refused)]
        self.plan.check_bad(bad, self.config.max_bad_fraction)
        assert self.encoder is not None
        manifest = Manifest(
            encoder=self.encoder,
            columns=[column.name for column in self.request.columns(self.encoder)],
            corpus=self.config.corpus,
            is_sample=self.config.limit is not None,
            shards=[record.shard for record in records if record.file is not None],
            quarantine=shards.write_quarantine(self.config.out, bad),
        )
        self.lease.check()
        write_manifest(self.config.out, manifest)
        ledger.tidy(self.config.out, records)
        summary.finish(manifest)
        storage.write_json(storage.join(self.config.out, "summary.json"), summary.to_dict())
        return summary


def _check_nothing_is_lost(out: str, before: Manifest, entries: Ledger, planned: CorpusPlan) -> None:
    """Raises UserError where a finished store holds rows that the corpus now lacks: a run only ever adds."""
    repeats = (row_keys(r.prompt_ids, r.contents) for r in planned.repeats)
    stays = _as_values(np.concatenate([planned.keys, *repeats]))
    records = {record.file.name: record for record in entries.commits.values() if record.file}
    for shard in before.shards:
        record = records.get(shard.file.name)
        lost = shard.file.rows if record is None else int((~np.isin(_as_values(record.row_keys), stays)).sum())
        if lost:
            raise UserError(
                f"{out}: holds {lost:,} rows of shard {shard.file.name} that this corpus has not, or has otherwise "
                f"({before.corpus} was extracted): choose another --out, or replace it with --overwrite"
            )


def _as_values(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(n, 3) keys as n values that numpy can compare."""
    return np.ascontiguousarray(keys).view([("", keys.dtype)] * 3)[:, 0]


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
