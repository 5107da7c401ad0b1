"""Estimates the cost of an extraction before it runs: prompts, tokens, GPU-hours and bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from prefill_jobs.extract.extract_job import parse_layers, parse_pooling
from prefill_jobs.options import ExtractConfig
from prefill_router.activations.activation_store import read_manifest
from prefill_router.common.schema import SENTENCE, ActivationColumn, activation_columns
from prefill_router.corpus.plan import plan
from prefill_router.corpus.reader import Row, files, read
from prefill_router.encoder.encoder_spec import EncoderSize

_GPU_FLOPS = 0.5 * 989e12  # half the peak of an H100 SXM in dense bf16, from its data sheet
_GPU = "half of an H100's peak"
_BYTES_PER_TOKEN = 4  # English text; used until prompts have been tokenized
_SAMPLED_ROWS = 1000  # whose mean length stands for the corpus
_BYTES_PER_ROW = 80  # id, length and row key, besides the activations
_PROBED_COLUMNS = 3  # typical number of columns that a probe chooses


@dataclass(frozen=True)
class ExtractionCost:
    prompts: int  # that at least one encoder reads
    tokens: int  # of all encoders together
    flops: float
    bytes: int
    is_bound: bool = False  # an upper bound, because the layers are not chosen yet

    def __add__(self, other: ExtractionCost) -> ExtractionCost:
        """The cost with that of another encoder that reads the same corpus."""
        return ExtractionCost(
            max(self.prompts, other.prompts),
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.is_bound or other.is_bound,
        )

    @property
    def gpu_hours(self) -> float:
        return self.flops / _GPU_FLOPS / 3600

    @property
    def text(self) -> str:
        most = "at most " if self.is_bound else ""
        return (
            f"{most}{self.prompts:,} prompts, about {self.tokens:,} tokens, {self.gpu_hours:.2g} GPU-hours at {_GPU}, "
            f"{self.bytes / 1e6:,.1f} MB"
        )


def extraction_cost(
    config: ExtractConfig, sample: ExtractConfig | None, chosen: ExtractConfig | None = None
) -> ExtractionCost:
    """Estimates the cost of one encoder, without the rows that its store has or that the `sample`'s store provides.

    The mean prompt length is that of the sample's store, if it exists. `chosen` is `config` with the layers that the
    probe chose; without it, the estimate runs all layers.
    """
    size = EncoderSize.of(config.encoder)
    columns = _columns(size, chosen or config)
    missing, copied = _missing(config, columns, sample)
    prompts = missing - copied
    mean_tokens = min(_mean_tokens(config, sample), config.max_tokens)
    deepest = max(column.layer for column in columns)
    flops = prompts * size.block.flops([round(mean_tokens)], 0, deepest)
    is_bound = sample is not None and chosen is None and size.kind == "causal"
    num_columns = _PROBED_COLUMNS if is_bound else len(columns)
    num_bytes = missing * (num_columns * size.hidden_size * 2 + _BYTES_PER_ROW)
    return ExtractionCost(prompts, round(prompts * mean_tokens), flops, num_bytes, is_bound)


def _columns(size: EncoderSize, config: ExtractConfig) -> list[ActivationColumn]:
    if size.kind == "sentence":
        return [ActivationColumn(SENTENCE, size.num_layers)]
    layers, pooling = parse_layers(config.layers), parse_pooling(config.pooling)
    return activation_columns(range(size.num_layers + 1) if layers == "all" else layers, pooling)


def _missing(config: ExtractConfig, columns: list[ActivationColumn], sample: ExtractConfig | None) -> tuple[int, int]:
    """Counts the prompts that the finished store lacks with these columns, and how many of them the sample has."""
    planned = plan(config.corpus, config.shard_rows, config.limit, config.max_prompt_bytes)
    held, num_prompts = read_manifest(config.out), int(planned.is_first.sum())
    if held is not None and {column.name for column in columns} <= set(held.columns):
        return max(0, num_prompts + planned.num_repeated - held.rows), 0
    if sample is None:
        return num_prompts, 0
    sampled = plan(sample.corpus, sample.shard_rows, sample.limit, sample.max_prompt_bytes)
    return num_prompts, min(num_prompts, int(sampled.is_first.sum()))


def _mean_tokens(config: ExtractConfig, sample: ExtractConfig | None) -> float:
    held = read_manifest(sample.out) if sample is not None else None
    if held is not None and held.rows:
        return held.shards.total("num_tokens") / held.rows
    rows = itertools.islice(read(files(config.corpus)[0]), _SAMPLED_ROWS)
    sizes = [len(str(row.prompt).encode()) for _, _, row in rows if isinstance(row, Row)]
    return max(1.0, sum(sizes) / max(1, len(sizes)) / _BYTES_PER_TOKEN)
