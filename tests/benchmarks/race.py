"""A race: contenders read the same chunks in turn, so that all of them see the same noise, and their outputs agree."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from contenders import Contender, Engine, Pooled
from numpy.typing import NDArray

from prefill_router.common.console import say
from prefill_router.common.schema import POOLINGS
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.hardware import measured_peak_flops
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefill_work import Work

# Relative L2 error of a column over all prompts: bfloat16 has 8 bits, and what we store of float32 has 11.
TOLERANCE = {"float32": {"last": 0.001, "mean": 0.001}, "bfloat16": {"last": 0.03, "mean": 0.02}}

WARM_UP_PROMPTS = {"cpu": 16, "cuda": None}  # on CUDA a whole chunk, for its memory is set aside at the first


@dataclass(frozen=True)
class Chunk:
    prompts: Sequence[Prompt]
    lengths: list[int]  # tokens

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


Check = Callable[[Chunk, dict[str, Pooled]], None]  # takes what each contender made of a chunk


def timed(contender: Contender, chunk: Chunk) -> tuple[float, tuple[Pooled, Work]]:
    started = time.perf_counter()
    result = contender.run(chunk.prompts)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


@dataclass
class Bench:
    """What all races use and add to."""

    device: torch.device
    encoder: PrefillEncoder
    rounds: int
    agreement: Agreement = field(default_factory=lambda: Agreement())
    peaks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # FLOP/s by dtype

    def race(self, contenders: Sequence[Contender], chunks: Sequence[Chunk], check: Check) -> Race:
        race = Race(contenders)
        for contender in contenders:
            contender.run(chunks[0].prompts[: WARM_UP_PROMPTS[self.device.type]])
        for turn, chunk in enumerate(itertools.chain.from_iterable([chunks] * self.rounds)):
            first = turn % len(contenders)
            check(chunk, race.run(chunk, [*contenders[first:], *contenders[:first]]))
            race.unshared_flops += self.encoder.cost.flops(chunk.lengths, 0, self.encoder.num_layers)
            self.measure_peaks()
            rates = " · ".join(f"{contender.name} {race.rates(contender)[-1]:,.0f}" for contender in contenders)
            say(f"chunk {turn + 1}/{len(chunks) * self.rounds}, tokens/s: {rates}")
        return race

    def measure_peaks(self) -> None:
        for dtype in TOLERANCE:
            self.peaks[dtype].append(measured_peak_flops(self.device, getattr(torch, dtype)))

    def median_peaks(self) -> dict[str, float]:
        return {dtype: float(np.median(values)) for dtype, values in self.peaks.items()}

    def engine(self, name: str, layers: Sequence[int] | None = None, kind: type[Engine] = Engine) -> Engine:
        return kind(name, self.encoder, self.encoder.columns(layers or "all", POOLINGS))

    def chunks(self, prompts: Sequence[Prompt], size: int) -> list[Chunk]:
        lengths = self.encoder.tokenize(prompts).num_tokens.tolist()
        starts = range(0, len(prompts), size)
        return [Chunk(prompts[start : start + size], lengths[start : start + size]) for start in starts]


@dataclass
class Race:
    """Seconds of each contender, a value a chunk, and its work."""

    contenders: Sequence[Contender]
    tokens: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    work: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    unshared_flops: float = 0.0

    def run(self, chunk: Chunk, in_order: Sequence[Contender]) -> dict[str, Pooled]:
        outputs = {}
        for contender in in_order:
            seconds, (outputs[contender.name], work) = timed(contender, chunk)
            self.seconds[contender.name].append(seconds)
            self.work[contender.name] += work
        self.tokens.append(chunk.tokens)
        return outputs

    def rates(self, contender: Contender) -> NDArray[np.float64]:
        """Tokens/s, a value a chunk."""
        return np.array(self.tokens) / self.seconds[contender.name]

    def total_s(self, contender: Contender) -> float:
        return sum(self.seconds[contender.name])

    def report(self, peaks: dict[str, float]) -> dict[str, dict[str, Any]]:
        return {contender.name: self._figures(contender, peaks[contender.dtype]) for contender in self.contenders}

    def _figures(self, contender: Contender, peak: float) -> dict[str, Any]:
        total_s, work = self.total_s(contender), self.work[contender.name]
        # Of the blocks' matrix products, without logits and padding. Only the engine counts its own.
        flops = work.flops or self.unshared_flops
        return {
            "dtype": contender.dtype,
            "seconds": total_s,
            "tokens_per_s": sum(self.tokens) / total_s,
            "tokens_per_s_by_chunk": _spread(self.rates(contender)),
            "times_as_fast_as": {
                other.name: {
                    "total": self.total_s(other) / total_s,
                    "by_chunk": _spread(self.rates(contender) / self.rates(other)),
                }
                for other in self.contenders
                if other is not contender
            },
            "computed_tokens": work.computed_tokens,
            "padding_waste": work.padding_waste,
            "flops_per_s": flops / total_s,
            "peak_flops_per_s": peak,
            "share_of_peak_computed": flops / total_s / peak,
            "share_of_peak_as_if_every_token_and_layer_were_computed": self.unshared_flops / total_s / peak,
        }


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}


@dataclass
class Agreement:
    """Relative L2 error of each contender's columns against a reference, over all prompts."""

    dtypes: dict[str, str] = field(default_factory=dict)
    squares: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, contender: Contender, got: Pooled, expected: Pooled) -> None:
        self.dtypes[contender.name] = contender.dtype
        sums = self.squares[contender.name]
        for column, values in got.items():
            reference = expected[column].astype(np.float64)
            more = np.array([((values - reference) ** 2).sum(), (reference**2).sum()])
            sums[column] = sums.get(column, np.zeros(2)) + more

    def report(self) -> list[dict[str, Any]]:
        """The worst column of each contender and pooling, and whether it is within the tolerance."""
        return [
            self._worst(name, pooling, allowed)
            for name, dtype in self.dtypes.items()
            for pooling, allowed in TOLERANCE[dtype].items()
        ]

    def _worst(self, name: str, pooling: str, allowed: float) -> dict[str, Any]:
        columns = [column for column in self.squares[name] if column.startswith(pooling)]
        difference, reference = np.array([self.squares[name][column] for column in columns]).T
        errors = np.nan_to_num(np.sqrt(difference / np.maximum(reference, 1e-30)), nan=np.inf)
        worst = int(errors.argmax())
        return {
            "contender": name,
            "pooling": pooling,
            "worst_error": float(errors[worst]),
            "worst_column": columns[worst],
            "tolerance": allowed,
            "agrees": bool(errors[worst] <= allowed),
        }
