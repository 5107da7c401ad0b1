"""A gateway's feedback as a pipeline reads it: its prompts as a corpus, its calls, and one outcome for each pair.

The gateway merges and adds files while a pipeline runs, so a round works on copies: `prompts/` gets a file with those
that are new, so that earlier ones keep their shards; `calls.parquet` and `outcomes.parquet` are written anew if they
change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from prefill_router import storage
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import (
    AT,
    CALL_ID,
    CORRECT,
    COST_USD,
    MESSAGES,
    OUTCOMES,
    OUTPUT_TOKENS,
    PROMPT,
    PROMPT_ID,
    PROPENSITY,
    TARGET,
)
from prefill_router.corpus.reader import Row, content_hash, files, read
from prefill_router.outcomes import is_feedback, load_feedback, tables

_CALLS = [PROMPT_ID, TARGET, CORRECT, OUTPUT_TOKENS, COST_USD, PROPENSITY, AT]
_PAIR = [PROMPT_ID, TARGET]
_READS = 3

T = TypeVar("T")


def is_folder_of_feedback(uri: str) -> bool:
    """Whether `uri` is the folder of `serve --feedback`, and has feedback."""
    outcomes = storage.join(uri, "outcomes")
    return not storage.is_file(uri) and bool(storage.list_names(outcomes)) and is_feedback(outcomes)


class GatheredFeedback:
    """The feedback in folders of gateways, with graded outcomes of other sources, copied to `out`."""

    def __init__(self, folders: Sequence[str], graded: Sequence[str], out: str, days: float | None) -> None:
        self.folders, self.graded, self.days = folders, graded, days
        self.prompts, self.calls, self.outcomes = (
            storage.join(out, name) for name in ("prompts", "calls.parquet", "outcomes.parquet")
        )

    @doing("gathering feedback")
    def update(self) -> None:
        """Copies what is new. Raises UserError if the gateway stored no prompts, or a propensity is invalid."""
        calls = _while_merged(self._recent_calls)
        num_new = _while_merged(self._add_prompts)  # after the calls, so that none lacks its prompt
        graded = pa.concat_tables(
            [OUTCOMES.empty_table(), *(table.cast(OUTCOMES) for uri in self.graded for table in tables(uri))]
        )
        pairs = pair_outcomes(calls).join(graded.select(_PAIR), _PAIR, join_type="left anti")
        outcomes = pa.concat_tables([graded, pairs.select(OUTCOMES.names).cast(OUTCOMES)])
        _write_if_changed(self.calls, calls)
        _write_if_changed(self.outcomes, outcomes.sort_by([(name, "ascending") for name in _PAIR]))
        num_explored = pc.sum(pc.less(calls[PROPENSITY], 1.0)).as_py() or 0
        say(
            f"pipeline: feedback on {len(calls):,} calls, {num_explored:,} made while exploring, makes {len(pairs):,} "
            f"outcomes beside {len(graded):,} graded ones; {num_new:,} prompts are new"
        )

    def _add_prompts(self) -> int:
        known = {row.prompt_id for file in self._files() for _, _, row in read(file) if isinstance(row, Row)}
        new: dict[str, Any] = {}
        for folder in self.folders:
            stored = storage.join(folder, "prompts")
            if not storage.list_names(stored):
                raise UserError(
                    f"{folder}: has no prompts: start the endpoint with --keep-prompts, and wait for feedback"
                )
            for file in files(stored):
                for _, _, row in read(file):
                    if isinstance(row, Row) and content_hash(row.prompt) not in known:
                        new[content_hash(row.prompt)] = row.prompt
        if new:
            name = f"{len(self._files()) + 1:06d}.parquet"
            storage.write_bytes(storage.join(self.prompts, name), storage.encode_parquet(_corpus(list(new.values()))))
        return len(new)

    def _files(self) -> list[str]:
        return files(self.prompts) if storage.exists(self.prompts) else []

    def _recent_calls(self) -> pa.Table:
        """The calls of all folders, oldest first. Days count back from the latest call."""
        found = [load_feedback(storage.join(folder, "outcomes"), _CALLS[3:]) for folder in self.folders]
        calls = pa.concat_tables(found, promote_options="default").sort_by([(AT, "ascending"), (CALL_ID, "ascending")])
        if not pc.all(pc.and_(pc.greater(calls[PROPENSITY], 0.0), pc.less_equal(calls[PROPENSITY], 1.0))).as_py():
            raise UserError(
                f"{', '.join(self.folders)}: propensity must be above 0 and at most 1: remove the invalid rows"
            )
        if self.days is None:
            return calls
        since = pc.max(calls[AT]).as_py() - timedelta(days=self.days)
        return calls.filter(pc.greater(calls[AT], pa.scalar(since, calls[AT].type)))


def _while_merged(read: Callable[[], T]) -> T:
    """Repeats a read if files vanish, because the gateway merges them at that moment."""
    for _ in range(_READS - 1):
        with suppress(FileNotFoundError):
            return read()
    return read()


def pair_outcomes(calls: pa.Table) -> pa.Table:
    """One outcome for each pair of prompt and target: the means of its calls, whoever made them."""
    means = [(CORRECT, "mean"), (OUTPUT_TOKENS, "mean"), (COST_USD, "mean")]
    pairs = calls.group_by(_PAIR).aggregate(means).rename_columns([*_PAIR, CORRECT, OUTPUT_TOKENS, COST_USD])
    return pairs.set_column(3, OUTPUT_TOKENS, pc.round(pairs[OUTPUT_TOKENS])).cast(OUTCOMES)


def _corpus(prompts: Sequence[Any]) -> pa.Table:
    """Prompts as a corpus without ids: a prompt's id is its content hash, as in the gateway."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.table(
        {
            PROMPT: pa.array([prompt if isinstance(prompt, str) else None for prompt in prompts], pa.string()),
            MESSAGES: pa.array([None if isinstance(p, str) else p for p in prompts], pa.list_(message)),
        }
    )


def _write_if_changed(uri: str, table: pa.Table) -> None:
    """Leaves an equal file as it is, so that steps that read it stay up to date."""
    data = storage.encode_parquet(table)
    if not storage.exists(uri) or storage.read_bytes(uri) != data:
        storage.write_bytes(uri, data)
