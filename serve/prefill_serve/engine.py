"""The engine of a replica: encoders and the router heads on top of them, run in batches on threads.

Tokenization, queueing, encoding and heads are timed separately. Each prompt carries the heads it was submitted for, so
that a change of routers loses no prompt.
"""

# N prompts of a batch, T targets

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.sensors import SensorTokens
from prefill_router.encoder.tokenization import Tokens
from prefill_router.policy.decision import Prediction
from prefill_router.router.artifact import Router
from prefill_serve.scheduler import Batch, BatchScheduler
from prefill_serve.sensor_set import SensorSet

_IDLE_S = 0.05
_WARM_UP = ["Hello.", "What is 17 * 23?", " ".join(["word"] * 200), "Name a river in Europe."]


@dataclass(frozen=True, eq=False)
class Head:
    """A loaded router. Its prices may differ from those in the artifact of `version`."""

    router: Router | BaselineRouter
    version: str
    tolerance: float

    @property
    def name(self) -> str:
        """Cache key of its estimates: version and targets. Prices do not affect estimates."""
        return f"{self.version}:{','.join(self.router.pool.target_names)}"

    @property
    def columns(self) -> list[ActivationColumn]:
        return self.router.columns if isinstance(self.router, Router) else []

    def estimate(
        self, tokens: SensorTokens, activations: dict[str, NDArray[Any]], missing: Collection[str] = ()
    ) -> list[Estimate]:
        """Returns one estimate per prompt. A baseline reads tokens, a router activations.

        `missing` encoders have no activations: the estimates and the distance are those by the others.
        """
        if isinstance(self.router, BaselineRouter):
            return [Estimate(Prediction(*row)) for row in zip(*self.router.predict_tokens(tokens[""]), strict=True)]
        features = self.router.features(activations, missing)
        predictions = [Prediction(*row) for row in zip(*self.router.predict_features(features), strict=True)]
        read = [name for name in self.router.encoders if name not in missing]
        distance = self.router.distance_of(read)
        if distance is None:
            return [Estimate(prediction) for prediction in predictions]
        distances = distance(features)
        percentiles = distance.percentile(distances)
        own = self._own_distances(features, read)
        return [Estimate(*row) for row in zip(predictions, distances.tolist(), percentiles.tolist(), own, strict=True)]

    def _own_distances(self, features: NDArray[np.float32], read: Sequence[str]) -> list[dict[str, float]]:
        """The distances by each encoder's own features, by name. Empty for a router with a single encoder."""
        assert isinstance(self.router, Router)
        if len(self.router.encoders) == 1:
            return [{}] * len(features)
        found = {name: distance for name in read if (distance := self.router.distance_of([name])) is not None}
        columns = [distance(features).tolist() for distance in found.values()]
        return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


class Estimate(NamedTuple):
    """A head's estimate for one prompt: prediction (T,) and distance from the training prompts."""

    prediction: Prediction
    distance: float | None = None
    percentile: float | None = None  # share of training prompts with a smaller distance
    own_distances: Mapping[str, float] = {}  # by encoder, where a router has several


class Times(NamedTuple):
    """Seconds per prompt, by phase."""

    tokenize: float
    queue: float
    encode: float
    head: float


@dataclass(frozen=True)
class PromptReading:
    """The result for one prompt: one estimate for each head asked."""

    estimates: list[Estimate]
    input_tokens: int
    is_truncated: bool
    times: Times
    batch_tokens: int
    missing: tuple[str, ...]  # encoders that it was read without


class _Job(NamedTuple):
    tokens: SensorTokens
    heads: tuple[Head, ...]
    tokenize_s: float


class Engine:
    """Encoders on `num_threads` cores, which the other threads of the process should leave free.

    The encoders read each batch in turn. The first one in use counts the tokens of a prompt.
    """

    def __init__(self, encoders: SensorSet, num_threads: int) -> None:
        self.sensors = encoders
        loaded = encoders.in_use.values()
        prefill = [sensor for sensor in loaded if isinstance(sensor, PrefillEncoder)]
        budget_tokens = min((sensor.budget_tokens for sensor in prefill), default=1 << 14)
        is_on_cpu = all(sensor.device.type == "cpu" for sensor in loaded)
        num_lanes = num_threads if is_on_cpu and (prefill or encoders.missing) else 1
        self.scheduler: BatchScheduler[_Job, PromptReading] = BatchScheduler(
            self._read, num_lanes, budget_tokens, num_threads
        )
        self._tokenizer = ThreadPoolExecutor(1, "tokenizer")
        self._num_in_use = 0

    @property
    def encoder_names(self) -> str:
        """Where the encoders are loaded from, for users."""
        return ", ".join(self.sensors.sources.values())

    async def tokenize(self, prompt: Prompt) -> tuple[SensorTokens, float]:
        """Returns the tokens of one prompt and the seconds taken. Raises UserError if the chat template rejects it."""
        started = perf_counter()
        with self._in_use():
            tokens = await asyncio.get_running_loop().run_in_executor(self._tokenizer, self.sensors.tokenize, prompt)
        return tokens, perf_counter() - started

    async def read(
        self, tokens: SensorTokens, heads: Sequence[Head], max_wait_s: float = float("inf"), tokenize_s: float = 0.0
    ) -> PromptReading:
        """Returns the estimates of `heads` for one tokenized prompt. Raises Overloaded if it would wait longer."""
        job = _Job(tokens, tuple(heads), tokenize_s)
        with self._in_use():
            return await self.scheduler.submit(job, sum(int(t.num_tokens.sum()) for t in tokens.values()), max_wait_s)

    async def warm_up(self, heads: Sequence[Head]) -> None:
        """Runs forward passes alone and on all lanes: the first pass in a thread is slow."""
        tokens = [(await self.tokenize(prompt))[0] for prompt in _WARM_UP]
        await self.read(tokens[0], heads)
        await asyncio.gather(*(self.read(t, heads) for t in tokens * self.scheduler.num_lanes))

    async def close(self) -> None:
        """Stops the threads once no request uses them."""
        await asyncio.sleep(_IDLE_S)  # a request that has just arrived may not be counted yet
        while self._num_in_use:
            await asyncio.sleep(_IDLE_S)
        self.sensors.close()
        self.scheduler.close()
        self._tokenizer.shutdown(wait=False)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self._num_in_use += 1
        try:
            yield
        finally:
            self._num_in_use -= 1

    def _read(self, batch: Batch[_Job]) -> list[PromptReading]:
        started = perf_counter()
        jobs = batch.items
        names = [name for name in self.sensors.sources if all(name in job.tokens for job in jobs)]
        tokens = {name: Tokens.joined([job.tokens[name] for job in jobs]) for name in names}
        heads = list(dict.fromkeys(head for job in jobs for head in job.heads))
        columns = list({column: None for head in heads for column in head.columns})
        activations, missing = self.sensors.read(tokens, columns)
        encoded = perf_counter()
        estimates = {head: head.estimate(tokens, activations, missing) for head in heads}
        counted = tokens[names[0]]
        ended = perf_counter()
        return [
            PromptReading(
                [estimates[head][i] for head in job.heads],
                int(counted.full_lengths[i]),
                bool(counted.is_truncated[i]),
                Times(job.tokenize_s, batch.queued_s[i], encoded - started, ended - encoded),
                batch.num_tokens,
                missing,
            )
            for i, job in enumerate(jobs)
        ]
