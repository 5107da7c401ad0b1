"""The actor that estimates: reads the prompts of a shard and writes a file with the router's estimates of them."""

# N prompts

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.extract.encoder_actor import EncoderActor
from prefill_jobs.runtime import cluster
from prefill_jobs.runtime.capacity import Effort
from prefill_router import storage
from prefill_router.activations.commit_log import RecordLocation
from prefill_router.activations.shard_builder import NOT_FINITE, ShardBuilder
from prefill_router.baselines import any_router
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.common.schema import ActivationColumn
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
    sources: tuple[RecordLocation, ...] = ()  # shards of a store that have some of their activations


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
        attempts: cluster.Shared,
    ) -> None:
        super().__init__(threads, attempts)
        self.uri, self.out, self.activations = router, out, activations
        self.max_prompt_bytes = max_prompt_bytes

    def __call__(self, task: EstimateTask) -> EstimateResult:
        attempt = self.begin(task.shard.digest)
        with self._loading:
            _ = self.router
        if not task.sources:  # the sources may have all activations
            self.load_encoder()
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
    def encoder(self) -> Sensor:
        return self.router.sensors[""]

    def _fill(self, estimates: PromptEstimates, rows: Sequence[Row], task: EstimateTask, attempt: int) -> Work:
        router, prompts = self.router, [row.prompt for row in rows]
        if isinstance(router, BaselineRouter):
            tokens = router.encoder.tokenize(prompts)
            _put(estimates, np.arange(len(prompts)), tokens.full_lengths, tokens.is_truncated)
            _predict(estimates, np.arange(len(prompts)), *router.predict_tokens(tokens))
            return Work(prompts=len(prompts), tokens=int(tokens.num_tokens.sum()))
        builder = self._builder(rows, task, router.columns)
        work = self._complete(builder, attempt)
        estimates.reasons[list(builder.refused)] = list(builder.refused.values())
        kept = np.array([i for i in range(len(prompts)) if i not in builder.refused], np.int64)
        if len(kept):
            _put(estimates, kept, builder.full_lengths[kept], builder.is_truncated[kept])
            features = router.features(builder.activations(kept.tolist()))
            _predict(estimates, kept, *router.predict_features(features))
            if router.distance is not None:
                estimates.percentile[kept] = router.distance.percentile(router.distance(features))
        return work

    def _builder(self, rows: Sequence[Row], task: EstimateTask, columns: list[ActivationColumn]) -> ShardBuilder:
        """The prompts with the activations that the store has. Prompts that it refused are not tried again."""
        ids, contents = [row.prompt_id for row in rows], [row.content_digest.hex() for row in rows]
        builder = ShardBuilder(task.shard.digest, ids, contents, columns)
        for source in task.sources:
            assert self.activations is not None
            builder.copy(self.activations, source)
        builder.prompts = [row.prompt for row in rows]
        return builder

    def _complete(self, builder: ShardBuilder, attempt: int) -> Work:
        """Computes the activations that the builder lacks. The encoder is loaded only if some are missing."""
        cut = np.flatnonzero(builder.is_truncated)  # copied rows, for which the store has no full length
        if not len(cut) and not any(builder.missing()):
            return Work()
        self.load_encoder()
        work = self.guarded_encoder.complete(builder, attempt)
        builder.full_lengths[cut] = self.guarded_encoder.encoder.tokenize(
            [builder.prompts[i] for i in cut]
        ).full_lengths
        return work


def _put(estimates: PromptEstimates, rows: NDArray[Any], lengths: NDArray[Any], is_truncated: NDArray[Any]) -> None:
    estimates.input_tokens[rows] = lengths
    estimates.is_truncated[rows] = is_truncated


def _predict(estimates: PromptEstimates, rows: NDArray[Any], p: NDArray[Any], output_tokens: NDArray[Any]) -> None:
    is_finite = np.isfinite(p).all(1) & np.isfinite(output_tokens).all(1)
    estimates.reasons[rows[~is_finite]] = NOT_FINITE
    estimates.p_correct[rows] = np.where(is_finite[:, None], p, 0.0)
    estimates.output_tokens[rows] = np.where(is_finite[:, None], output_tokens, 0.0)
