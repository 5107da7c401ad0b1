"""The actor that estimates: reads the prompts of a shard and writes a file with the router's estimates of them."""

# N prompts

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.extract.encoder_actor import EncoderActor
from prefill_jobs.runtime.capacity import Effort
from prefill_jobs.runtime.shared_objects import Shared
from prefill_jobs.runtime.worker_notes import WorkerNote
from prefill_router import storage
from prefill_router.activations.commit_log import RecordLocation
from prefill_router.activations.joined_stores import store_below
from prefill_router.activations.shard_builder import NOT_FINITE, ShardBuilder
from prefill_router.baselines import any_router
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.corpus.plan import Shard, read_shard
from prefill_router.corpus.reader import Row
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.sensors import Sensor
from prefill_router.query_log.estimates import PromptEstimates, contents_of
from prefill_router.router.artifact import Router
from prefill_router.storage import parquet_objects


@dataclass(frozen=True)
class EstimateTask:
    """Rows of a shard to estimate."""

    shard: Shard
    rows: NDArray[np.int64]  # indices among the rows that the shard keeps
    # Shards of each encoder's store that have some of their activations, by encoder.
    sources: Mapping[str, tuple[RecordLocation, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class EstimateResult:
    """Counts of a finished task."""

    num_prompts: int
    num_refused: int  # included in num_prompts
    effort: Effort


class ShardEstimator(EncoderActor):
    """Estimates prompts of shards."""

    def __init__(
        self,
        router: str,
        out: str,
        activations: str | None,
        max_prompt_bytes: int,
        threads: int,
        attempts: Shared,
        note: WorkerNote,
    ) -> None:
        super().__init__(threads, attempts, note)
        self.uri, self.out, self.activations = router, out, activations
        self.max_prompt_bytes = max_prompt_bytes

    def __call__(self, task: EstimateTask) -> EstimateResult:
        attempt = self.begin(task.shard.digest)
        with self._loading:
            _ = self.router
        if not any(task.sources.values()):  # the sources may have all activations
            self.load_encoders()
        rows = read_shard(task.shard, self.max_prompt_bytes)
        wanted = [rows[i] for i in task.rows]
        contents = contents_of([row.content_digest for row in wanted])
        name = hashlib.sha256(contents.tobytes()).hexdigest()[:32]
        file, work = parquet_objects.file_name(name), Work()
        if attempt > 1 and storage.exists(storage.join(self.out, file)):  # an attempt crashed after writing it
            estimates = PromptEstimates.load(self.out, file)
        else:
            estimates = PromptEstimates.unread(contents, len(self.router.pool.targets))
            work = self._fill(estimates, wanted, task, attempt)
            parquet_objects.create_shard(self.out, name, estimates.to_table())
        num_refused = sum(reason is not None for reason in estimates.reasons)
        return EstimateResult(len(wanted), num_refused, self.effort(work, attempt))

    @cached_property
    def router(self) -> Router | BaselineRouter:
        return any_router.load(self.uri)

    @property
    def sensors(self) -> Mapping[str, Sensor]:
        return self.router.sensors

    def _fill(self, estimates: PromptEstimates, rows: Sequence[Row], task: EstimateTask, attempt: int) -> Work:
        router, prompts = self.router, [row.prompt for row in rows]
        if isinstance(router, BaselineRouter):
            tokens = router.encoder.tokenize(prompts)
            _put(estimates, np.arange(len(prompts)), tokens.full_lengths, tokens.is_truncated)
            _predict(estimates, np.arange(len(prompts)), *router.predict_tokens(tokens))
            return Work(prompts=len(prompts), tokens=int(tokens.num_tokens.sum()))
        builders = self._builders(router, rows, task)
        work = self._complete(builders, attempt)
        first = builders[next(iter(builders))]  # its encoder counts input tokens
        estimates.reasons[list(first.refused)] = list(first.refused.values())
        kept = np.array([i for i in range(len(prompts)) if i not in first.refused], np.int64)
        if len(kept):
            _put(estimates, kept, first.full_lengths[kept], first.is_truncated[kept])
            features = router.features(_activations(builders, kept.tolist()))
            _predict(estimates, kept, *router.predict_features(features))
            if router.distance is not None:
                estimates.percentile[kept] = router.distance.percentile(router.distance(features))
        return work

    def _builders(self, router: Router, rows: Sequence[Row], task: EstimateTask) -> dict[str, ShardBuilder]:
        """The prompts for each encoder, with the activations that its store has.

        Prompts that a store refused are not tried again, and one that an encoder refuses is refused by all.
        """
        ids, contents = [row.prompt_id for row in rows], [row.content_digest.hex() for row in rows]
        builders: dict[str, ShardBuilder] = {}
        refused: dict[int, str] = {}
        for name in router.encoders:
            columns = [column.unnamed for column in router.columns if column.encoder == name]
            builder = builders[name] = ShardBuilder(task.shard.digest, ids, contents, columns)
            builder.refused = refused
            for source in task.sources.get(name, ()):
                assert self.activations is not None
                builder.copy(store_below(self.activations, name), source)
            builder.prompts = [row.prompt for row in rows]
        return builders

    def _complete(self, builders: Mapping[str, ShardBuilder], attempt: int) -> Work:
        """Computes the activations that the builders lack. The encoders are loaded only if some are missing."""
        first = builders[next(iter(builders))]
        cut = np.flatnonzero(first.is_truncated)  # copied rows, for which the store has no full length
        if not len(cut) and not any(any(builder.missing()) for builder in builders.values()):
            return Work()
        self.load_encoders()
        works = [self.guarded_encoders[name].complete(builder, attempt) for name, builder in builders.items()]
        tokens = next(iter(self.sensors.values())).tokenize([first.prompts[i] for i in cut])
        first.full_lengths[cut] = tokens.full_lengths
        # A prompt counts once, whatever the number of encoders that read it.
        return replace(sum(works, Work()), prompts=max(work.prompts for work in works))


def _activations(builders: Mapping[str, ShardBuilder], rows: Sequence[int]) -> dict[str, NDArray[np.float16]]:
    """The activations of `rows` by the names of the router's columns."""
    return {
        column.of(name).name: values
        for name, builder in builders.items()
        for column, values in zip(builder.columns, builder.activations(rows).values(), strict=True)
    }


def _put(estimates: PromptEstimates, rows: NDArray[Any], lengths: NDArray[Any], is_truncated: NDArray[Any]) -> None:
    estimates.input_tokens[rows] = lengths
    estimates.is_truncated[rows] = is_truncated


def _predict(estimates: PromptEstimates, rows: NDArray[Any], p: NDArray[Any], output_tokens: NDArray[Any]) -> None:
    is_finite = np.isfinite(p).all(1) & np.isfinite(output_tokens).all(1)
    estimates.reasons[rows[~is_finite]] = NOT_FINITE
    estimates.p_correct[rows] = np.where(is_finite[:, None], p, 0.0)
    estimates.output_tokens[rows] = np.where(is_finite[:, None], output_tokens, 0.0)
