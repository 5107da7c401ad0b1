"""Outcomes in memory: matrices with 8 bytes for each prompt, and 12 for each pair of a prompt and a target.

A missing pair is NaN, never a wrong answer.
"""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefill_router.common.errors import UserError, some_of
from prefill_router.common.schema import (
    CORRECT,
    COST_USD,
    OUTPUT_TOKENS,
    PROMPT_ID,
    TARGET,
)
from prefill_router.corpus.reader import content_bits
from prefill_router.corpus.split import PromptHashes, prompt_hashes
from prefill_router.outcomes.outcome_tables import is_feedback, tables


class Answers(NamedTuple):
    """Outcomes of a list of prompts, in its order; NaN where a pair was not graded, or its value not recorded."""

    correct: NDArray[np.float32]  # (N, T), in [0, 1]
    output_tokens: NDArray[np.float32]  # (N, T)
    cost_usd: NDArray[np.float32]  # (N, T) as billed


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a list of targets, NaN where missing."""

    uri: str
    targets: list[str]
    keys: NDArray[np.uint64]  # (N,) ascending hashes of the prompts that at least one target was graded on
    correct: NDArray[np.float32]  # (N, T), in [0, 1]
    output_tokens: NDArray[np.float32]  # (N, T)
    cost_usd: NDArray[np.float32]  # (N, T) as billed
    num_other_targets: int  # graded in the table, but not in `targets`

    def check_known(self, keys: NDArray[np.uint64], *, ignore_unknown: bool) -> int:
        """Counts graded prompts whose hashes are not in `keys`. Raises UserError if there are any, unless ignored."""
        unknown = self.keys[~np.isin(self.keys, keys)]
        if len(unknown) and not ignore_unknown:
            raise UserError(
                f'{self.uri}: prompt_id "{self._id_of(unknown)}" has outcomes but no activations ({len(unknown):,} '
                "such prompts): extract the missing prompts, or pass --ignore-unknown"
            )
        return len(unknown)

    def of_first(self, num_targets: int) -> Outcomes:
        """Returns the outcomes of the first targets only."""
        first = slice(num_targets)
        return replace(
            self,
            targets=self.targets[first],
            correct=self.correct[:, first],
            output_tokens=self.output_tokens[:, first],
            cost_usd=self.cost_usd[:, first],
        )

    def by_content(self, prompts: PromptHashes, contents: PromptHashes) -> Outcomes:
        """Returns these outcomes under the ids of a corpus, for outcomes whose ids are hashes of the prompts' content.

        `prompts` (N,) are hashes of the corpus's ids and `contents` (N,) 64 bits of its prompts. Other outcomes stay.
        """
        rows = self._content_rows()
        row_of = np.array([rows.get(content, -1) for content in contents.tolist()], np.int64)
        found, which = prompts[row_of >= 0], row_of[row_of >= 0]
        rest = np.setdiff1d(np.arange(len(self.keys)), which)
        keys, first = np.unique(np.concatenate([found, self.keys[rest]]), return_index=True)
        which = np.concatenate([which, rest])[first]
        values = (self.correct[which], self.output_tokens[which], self.cost_usd[which])
        return Outcomes(self.uri, self.targets, keys, *values, self.num_other_targets)

    def _content_rows(self) -> dict[int, int]:
        """The row of each outcome whose id is a content hash, by 64 bits of that content."""
        ids = {name for table in tables(self.uri) for name in pc.unique(table[PROMPT_ID]).to_pylist()}
        contents = {name: bits for name in ids if (bits := content_bits(name)) is not None}
        keys = prompt_hashes(contents)
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        is_own = self.keys[rows] == keys
        return {bits: row for bits, row, own in zip(contents.values(), rows.tolist(), is_own, strict=True) if own}

    @property
    def example(self) -> str:
        """The prompt_id of an outcome."""
        return self._id_of(self.keys[:1])

    def _id_of(self, keys: NDArray[np.uint64]) -> str:
        """Searches the table for a prompt_id whose hash is in `keys`."""
        for batch in _graded_batches(self.uri, self.targets):
            found = np.flatnonzero(np.isin(batch.keys, keys))
            if len(found):
                return str(batch.table[PROMPT_ID][int(found[0])])
        raise AssertionError(f"{self.uri}: changed while it was being read")

    def align(self, prompt_ids: Iterable[str]) -> Answers:
        """Returns the outcomes of `prompt_ids`; all NaN for a prompt that was never graded."""
        return self.at(prompt_hashes(prompt_ids))

    def at(self, keys: NDArray[np.uint64]) -> Answers:
        """Returns the outcomes of prompts by their hashes."""
        index = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        missing = self.keys[index] != keys

        def take(values: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.where(missing[:, None], np.float32(np.nan), values[index])

        return Answers(take(self.correct), take(self.output_tokens), take(self.cost_usd))


def load_outcomes(uri: str, targets: Sequence[str], correct_at: float | None = None) -> Outcomes:
    """Reads the outcomes of `targets` from a Parquet file or a folder of them, in batches and in two passes.

    With `correct_at`, each answer counts as right (1) if its reward is at least that, and as wrong (0) otherwise.

    In feedback (`schema.FEEDBACK`) a pair may occur in many requests, and gets the mean of its rows; a repeated request
    counts once. Raises UserError for a missing column, a `correct` outside [0, 1], a negative or infinite length or
    cost, a pair that is repeated in other outcomes, or a target without outcomes.
    """
    keys, others = _graded_keys(uri, targets)
    fill = _mean_of_pairs if is_feedback(uri) else _pairs
    answers = fill(uri, targets, keys, correct_at)
    is_graded_T = np.asarray((~np.isnan(answers.correct)).any(0))
    for target, is_graded in zip(targets, is_graded_T, strict=True):
        if not is_graded:
            names = some_of(others | set(np.array(targets)[is_graded_T].tolist()))
            raise UserError(
                f'{uri}: target "{target}" of the pool has no outcome: grade its answers, or use only {names}'
            )
    return Outcomes(uri, list(targets), keys, *answers, len(others))


def _pairs(uri: str, targets: Sequence[str], keys: NDArray[np.uint64], correct_at: float | None) -> Answers:
    """Reads outcomes in which each pair occurs once."""
    answers = Answers(*np.full((len(Answers._fields), len(keys), len(targets)), np.nan, np.float32))
    num_rows = 0
    for batch in _graded_batches(uri, targets):
        pairs = np.searchsorted(keys, batch.keys), batch.targets
        for known, values in zip(answers, _values(batch.table, uri, correct_at), strict=True):
            known[pairs] = values
        num_rows += len(batch.keys)
    if (~np.isnan(answers.correct)).sum() != num_rows:
        _raise_repeated(uri, targets, keys)
    return answers


def _mean_of_pairs(uri: str, targets: Sequence[str], keys: NDArray[np.uint64], correct_at: float | None) -> Answers:
    """Reads outcomes in which a pair may occur many times, and takes their mean."""
    shape = len(Answers._fields), len(keys), len(targets)
    sums, counts = (np.zeros(shape, dtype) for dtype in (np.float32, np.uint32))
    for batch in _graded_batches(uri, targets):
        pairs = np.searchsorted(keys, batch.keys), batch.targets
        for total, count, values in zip(sums, counts, _values(batch.table, uri, correct_at), strict=True):
            np.add.at(total, pairs, np.nan_to_num(values))
            np.add.at(count, pairs, ~np.isnan(values))
    with np.errstate(invalid="ignore"):
        return Answers(*np.asarray(sums / counts, np.float32))


def _values(table: pa.Table, uri: str, correct_at: float | None) -> Answers:
    """Returns the values (N,) of rows, NaN where a length or cost is null. Raises UserError for invalid values."""
    correct, lengths, costs = table[CORRECT].to_numpy(), table[OUTPUT_TOKENS], table[COST_USD]
    known_costs = costs.fill_null(0.0).to_numpy()
    _check_all((correct >= 0) & (correct <= 1), table, CORRECT, "in [0, 1]", uri)
    _check_all(lengths.fill_null(0).to_numpy() >= 0, table, OUTPUT_TOKENS, ">= 0", uri)
    _check_all((known_costs >= 0) & (known_costs < np.inf), table, COST_USD, "finite and >= 0, or null", uri)
    correct = at_threshold(correct, correct_at)
    return Answers(correct, *(column.cast(pa.float32()).to_numpy() for column in (lengths, costs)))


def at_threshold(rewards: NDArray[Any], correct_at: float | None) -> NDArray[np.float32]:
    """Returns rewards (N,) as they are, or with `correct_at`, 1 for those that reach it and 0 for the others."""
    narrow = rewards.astype(np.float32)  # as `correct` is stored: 0.7 reaches 0.7
    return narrow if correct_at is None else (narrow >= np.float32(correct_at)).astype(np.float32)


class _Batch(NamedTuple):
    table: pa.Table
    keys: NDArray[np.uint64]  # hash of each row's prompt
    targets: NDArray[np.int64]  # index of each row's target


def _graded_batches(uri: str, targets: Sequence[str]) -> Iterator[_Batch]:
    names = pa.array(list(targets), pa.string())
    for table in tables(uri):
        table = table.filter(pc.is_in(table[TARGET], value_set=names)).combine_chunks()
        ids = pc.dictionary_encode(table[PROMPT_ID].combine_chunks())
        keys = prompt_hashes(ids.dictionary.to_pylist())[np.asarray(ids.indices)]
        yield _Batch(table, keys, np.asarray(pc.index_in(table[TARGET], value_set=names), np.int64))


def _graded_keys(uri: str, targets: Sequence[str]) -> tuple[NDArray[np.uint64], set[str]]:
    """Returns the ascending hashes of the prompts that `targets` were graded on, and the names of other targets."""
    keys, more, num_more = np.empty(0, np.uint64), [np.empty(0, np.uint64)], 0
    names: set[str] = set()
    for table in tables(uri):
        names.update(pc.unique(table[TARGET]).to_pylist())
        wanted = pc.is_in(table[TARGET], value_set=pa.array(list(targets), pa.string()))
        more.append(prompt_hashes(pc.unique(table[PROMPT_ID].filter(wanted)).to_pylist()))
        num_more += len(more[-1])
        if num_more > len(keys):  # merging only when their number doubles keeps the total cost linear
            keys, more, num_more = np.unique(np.concatenate([keys, *more])), [], 0
    return np.unique(np.concatenate([keys, *more])), names - set(targets)


def _check_all(fits: NDArray[np.bool_], table: pa.Table, column: str, allowed: str, uri: str) -> None:
    if not fits.all():
        row = table.slice(int(np.argmin(fits)), 1).to_pylist()[0]
        pair = f'prompt "{row[PROMPT_ID]}", target "{row[TARGET]}"'
        raise UserError(f"{uri}: {pair}: {column} = {row[column]}, must be {allowed}")


def _raise_repeated(uri: str, targets: Sequence[str], keys: NDArray[np.uint64]) -> None:
    seen = np.zeros((len(keys), len(targets)), bool)
    for batch in _graded_batches(uri, targets):
        for i, pair in enumerate(zip(np.searchsorted(keys, batch.keys), batch.targets, strict=True)):
            if seen[pair]:
                prompt_id, target = batch.table[PROMPT_ID][i], batch.table[TARGET][i]
                raise UserError(f'{uri}: prompt "{prompt_id}", target "{target}" has more than one outcome')
            seen[pair] = True
