"""Column names and Arrow schemas of every table that is written to storage or passed between components.

Tables are Parquet with zstd and standard Arrow types, so DuckDB, Polars and pandas read them in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pyarrow as pa

from prefill_router.common.errors import UserError

PROMPT_ID = "prompt_id"
PROMPT = "prompt"
MESSAGES = "messages"
TARGET = "target"
CORRECT = "correct"
INPUT_TOKENS = "input_tokens"
OUTPUT_TOKENS = "output_tokens"
COST_USD = "cost_usd"
MODEL = "model"
NUM_TOKENS = "num_tokens"

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
SENTENCE: Literal["sentence"] = "sentence"  # the pooling of sentence encoders, which each of them defines itself
MeanOver = Literal["all", "after_first"]

OUTCOMES = pa.schema(
    [
        pa.field(PROMPT_ID, pa.string(), nullable=False),
        pa.field(TARGET, pa.string(), nullable=False),
        pa.field(CORRECT, pa.float32()),
        pa.field(OUTPUT_TOKENS, pa.int32()),
        pa.field(COST_USD, pa.float64()),  # as billed
    ]
)

PROPENSITY = "propensity"
REQUEST_ID = "request_id"
AT = "answered_at"
CALLER = "caller"
CALL_ID = "call_id"
FIRST_TOKEN_S = "first_token_s"
LATENCY_S = "latency_s"

# Outcomes of answered requests: one row per grade of a (prompt, target) pair, and at most one per call. Callers choose
# their request ids, so two callers may use the same one.
FEEDBACK = pa.schema(
    [
        *OUTCOMES,
        pa.field(PROPENSITY, pa.float64(), nullable=False),
        pa.field(REQUEST_ID, pa.string(), nullable=False),
        pa.field(AT, pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field(CALLER, pa.string()),
        pa.field(CALL_ID, pa.string()),
        pa.field(FIRST_TOKEN_S, pa.float32()),
        pa.field(LATENCY_S, pa.float32()),
    ]
)

# Target answers received by `collect`, with what grading and cost accounting need. Calls without an answer have a
# reason.
ANSWERS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field(PROMPT_ID, pa.string(), nullable=False),
        pa.field(TARGET, pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field(INPUT_TOKENS, pa.int32()),
        pa.field(OUTPUT_TOKENS, pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("cache_write_tokens", pa.int32()),
        pa.field("cache_write_long_tokens", pa.int32()),
        pa.field(LATENCY_S, pa.float32()),
        pa.field(COST_USD, pa.float64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("lost_usd", pa.float64(), nullable=False),  # on failed attempts that may have been billed
        pa.field("lost_tokens", pa.int64(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)

# The shards of an activation store, as listed in its manifest.
SHARDS = pa.schema(
    [
        pa.field("file", pa.string()),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field(NUM_TOKENS, pa.int64(), nullable=False),
        pa.field("num_truncated", pa.int64(), nullable=False),
    ]
)

_QUARANTINED = pa.struct(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

# Committed shards. `file` is null if no row could be encoded; `columns` holds comma-separated names.
COMMITS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        *SHARDS,
        pa.field("columns", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("truncated", pa.list_(pa.int32()), nullable=False),
        pa.field("refused", pa.list_(_QUARANTINED), nullable=False),
    ]
)

# Invalid corpus rows. `row` counts from 0 within the file; `prompt_id` is null if it could not be read.
QUARANTINE = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.string()),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, order=True)
class ActivationColumn:
    """One pooled layer in the activation store, named like `last_012`.

    `layer` is the index in transformers' `hidden_states`: 0 is the embedding, L the output of block L. The last index
    is taken after the final norm. Where several encoders read the same prompts, a column is named with its encoder,
    like `SmolLM2-135M:last_012`.
    """

    pooling: Pooling | Literal["sentence"]
    layer: int
    encoder: str = ""

    @property
    def name(self) -> str:
        column = f"{self.pooling}_{self.layer:03d}"
        return f"{self.encoder}:{column}" if self.encoder else column

    @property
    def unnamed(self) -> ActivationColumn:
        """The column as its encoder and its store name it."""
        return replace(self, encoder="")

    def of(self, encoder: str) -> ActivationColumn:
        return replace(self, encoder=encoder)

    @classmethod
    def parse(cls, name: str) -> ActivationColumn:
        match = re.fullmatch(r"(?:([\w.-]+):)?(last|mean|sentence)_(\d{3,})", name)
        if match is None:
            raise UserError(f'"{name}" is not an activation column: expected a pooling and a layer, like last_012')
        return cls(match[2], int(match[3]), match[1] or "")  # type: ignore[arg-type]


def activation_columns(layers: Iterable[int], pooling: Sequence[Pooling]) -> list[ActivationColumn]:
    """Returns the column of every requested (pooling, layer), in the store's order: by pooling, then by layer."""
    return [ActivationColumn(p, layer) for p in dict.fromkeys(pooling) for layer in sorted(set(layers))]


def activations(columns: Sequence[ActivationColumn], hidden_size: int) -> pa.Schema:
    """Schema of an activation shard: `prompt_id`, `num_tokens`, a float16 vector of `hidden_size` per column."""
    vector = pa.list_(pa.field("element", pa.float16(), nullable=False), hidden_size)
    return pa.schema(
        [
            pa.field(PROMPT_ID, pa.string(), nullable=False),
            pa.field(NUM_TOKENS, pa.int32(), nullable=False),
            *(pa.field(column.name, vector, nullable=False) for column in columns),
        ]
    )


def estimates(num_targets: int) -> pa.Schema:
    """Schema of a router's estimates, keyed by prompt content. `reason` says why a prompt could not be read."""
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), num_targets)
    return pa.schema(
        [
            pa.field("content", pa.binary(16), nullable=False),
            pa.field(INPUT_TOKENS, pa.int32(), nullable=False),
            pa.field("is_truncated", pa.bool_(), nullable=False),
            pa.field("p_correct", vector, nullable=False),
            pa.field(OUTPUT_TOKENS, vector, nullable=False),
            pa.field("percentile", pa.float32()),
            pa.field("reason", pa.string()),
        ]
    )


def decisions(targets: Sequence[str], extras: Sequence[str] = ()) -> pa.Schema:
    """Schema of routing decisions for a query log: one row per logged query, with its file and row (from 0).

    `extras` are log columns to copy as text. `target` is null if no target met the constraints.
    """
    per_target = pa.struct([pa.field(t, pa.float32()) for t in targets])
    return pa.schema(
        [
            pa.field(PROMPT_ID, pa.string(), nullable=False),
            pa.field("file", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field(TARGET, pa.string()),
            pa.field(INPUT_TOKENS, pa.int32(), nullable=False),
            pa.field("p_correct", per_target),
            pa.field("expected_output_tokens", per_target),
            pa.field("expected_cost_usd", per_target),
            pa.field("percentile", pa.float32()),
            pa.field("router_version", pa.string(), nullable=False),
            *(pa.field(name, pa.string()) for name in extras),
        ]
    )
