"""Graded answers: which target was right on which prompt, and how long its answer was.

Long format on disk, a matrix in memory. A missing pair is NaN, never a wrong answer.
"""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.errors import UserError
from prefill_router.schema import CORRECT, OUTCOMES, OUTPUT_TOKENS, PROMPT_ID, TARGET


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a pool's targets; NaN where a pair was not graded, or its length not recorded."""

    targets: list[str]
    prompt_ids: pa.Array  # (N,) string, unique
    correct: NDArray[np.float32]  # (N, T), in [0, 1]
    output_tokens: NDArray[np.float32]  # (N, T)
    num_other_targets: int  # targets that the table grades but the pool leaves out

    def check_known(self, prompt_ids: pa.Array, source: str, *, ignore_unknown: bool) -> int:
        """How many graded prompts are not among `prompt_ids`. Raises UserError if any, unless they are ignored."""
        unknown = self.prompt_ids.filter(pc.invert(pc.is_in(self.prompt_ids, value_set=prompt_ids)))
        if len(unknown) and not ignore_unknown:
            raise UserError(
                f'{source}: prompt_id "{unknown[0]}" has outcomes but no activations ({len(unknown):,} such prompts): '
                "extract its prompt too, or pass --ignore-unknown"
            )
        return len(unknown)

    def align(self, prompt_ids: pa.Array) -> Outcomes:
        """The outcomes of `prompt_ids`, in their order; all NaN for a prompt that was never graded."""
        rows = pc.index_in(prompt_ids, value_set=self.prompt_ids)
        missing = np.asarray(rows.is_null())
        index = np.asarray(rows.fill_null(0))

        def take(values: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.where(missing[:, None], np.float32(np.nan), values[index])

        return replace(self, prompt_ids=prompt_ids, correct=take(self.correct), output_tokens=take(self.output_tokens))


def load_outcomes(uri: str, targets: Sequence[str]) -> Outcomes:
    """The outcomes of `targets` at `uri`, a Parquet file or a folder of them.

    Raises UserError for a missing column, a `correct` outside [0, 1], a pair that stands twice, and a target without
    a single outcome.
    """
    storage.require(uri, "outcomes")
    files = storage.list_files(uri, [".parquet"])
    if not files:
        raise UserError(f"{uri}: holds no Parquet file of outcomes")
    table = pa.concat_tables([_read(file) for file in files])
    known = pa.array(list(targets), pa.string())
    others = pc.unique(table[TARGET].filter(pc.invert(pc.is_in(table[TARGET], value_set=known))))
    table = table.filter(pc.is_in(table[TARGET], value_set=known)).combine_chunks()
    _check_pairs(table, uri)
    graded = set(pc.unique(table[TARGET]).to_pylist())
    for target in targets:
        if target not in graded:
            raise UserError(f'{uri}: target "{target}" of the pool has no outcome; it grades {_some(graded, others)}')
    ids = pc.dictionary_encode(table[PROMPT_ID].combine_chunks())
    pair = np.asarray(ids.indices), np.asarray(pc.index_in(table[TARGET], value_set=known))

    def matrix(column: str) -> NDArray[np.float32]:
        values = np.full((len(ids.dictionary), len(targets)), np.nan, np.float32)
        values[pair] = table[column].cast(pa.float32()).to_numpy()
        return values

    return Outcomes(list(targets), ids.dictionary, matrix(CORRECT), matrix(OUTPUT_TOKENS), len(others))


def _some(graded: set[str], others: pa.Array) -> str:
    names = sorted(graded | set(others.to_pylist()))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read(uri: str) -> pa.Table:
    with storage.open_parquet(uri) as file:
        names = file.schema_arrow.names
        for required in (PROMPT_ID, TARGET, CORRECT):
            if required not in names:
                raise UserError(f"{uri}: column {required} is missing; it has {', '.join(names)}")
        table = file.read(columns=[name for name in OUTCOMES.names if name in names])
    if OUTPUT_TOKENS not in names:
        table = table.append_column(OUTPUT_TOKENS, pa.nulls(len(table), pa.int32()))
    columns = []
    for field in OUTCOMES:
        try:
            columns.append(table[field.name].cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{uri}: column {field.name} must be {field.type}: {error}") from None
    table = pa.table(columns, names=OUTCOMES.names)
    for key in (PROMPT_ID, TARGET):
        if table[key].null_count:
            raise UserError(f"{uri}: {table[key].null_count} rows have no {key}")
    # An answer that was never graded is a missing outcome.
    return table.filter(pc.is_valid(table[CORRECT]))


def _check_pairs(table: pa.Table, uri: str) -> None:
    correct = np.asarray(table[CORRECT])
    _check_all((correct >= 0) & (correct <= 1), table, CORRECT, "in [0, 1]", uri)
    _check_all(table[OUTPUT_TOKENS].fill_null(0).to_numpy() >= 0, table, OUTPUT_TOKENS, ">= 0", uri)
    counts = table.group_by([PROMPT_ID, TARGET]).aggregate([(CORRECT, "count")])
    repeated = counts.filter(pc.greater(counts[f"{CORRECT}_count"], 1))
    if len(repeated):
        row = repeated.slice(0, 1).to_pylist()[0]
        raise UserError(f'{uri}: prompt "{row[PROMPT_ID]}", target "{row[TARGET]}" has more than one outcome')


def _check_all(fits: NDArray[np.bool_], table: pa.Table, column: str, allowed: str, uri: str) -> None:
    if not fits.all():
        row = table.slice(int(np.argmin(fits)), 1).to_pylist()[0]
        pair = f'prompt "{row[PROMPT_ID]}", target "{row[TARGET]}"'
        raise UserError(f"{uri}: {pair}: {column} = {row[column]}, must be {allowed}")
