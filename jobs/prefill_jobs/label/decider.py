"""The tasks of `label` that decide: join the lines of a shard with their estimates and write partitioned decisions."""

# N lines, T targets, K shadow prices

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.common.schema import COST_USD, MODEL, decisions
from prefill_router.common.usage import Usage
from prefill_router.corpus.plan import RowPosition, Shard, read_shard
from prefill_router.corpus.reader import BadRow, Row, folder_keys
from prefill_router.policy.selection import NO_TARGET
from prefill_router.query_log.aggregates import UNKNOWN, Lines, Tally, day_of
from prefill_router.query_log.allocation import Totals, totals
from prefill_router.query_log.assignment import LogPolicy
from prefill_router.query_log.estimates import ContentIndex, PromptEstimates, contents_of
from prefill_router.storage import parquet_objects
from prefill_router.storage.parquet_objects import ShardFile

DAY = "day"
_USED = (MODEL, COST_USD, *Usage._fields)
_CACHED_FILES = 64  # of estimates, per process: repeated prompts repeat often


@dataclass(frozen=True)
class DecideContext:
    """Inputs that all shards share."""

    log: str
    out: str  # folder of decisions
    estimates: str
    policy: LogPolicy
    router_version: str
    max_prompt_bytes: int
    by: tuple[str, ...]  # columns of the log by which the report breaks results down
    time: str | None
    partition_by: tuple[str, ...] | None  # `day` and columns of `by`; None keeps the folders of the log

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the log that are copied to decisions."""
        return ((DAY,) if self.time is not None else ()) + self.by

    @property
    def extras(self) -> list[str]:
        """Columns of the log that are read besides the prompt."""
        return list(dict.fromkeys([*self.by, *([self.time] if self.time else []), *_USED]))


@dataclass(frozen=True)
class DecideTask:
    shard: Shard
    position: int  # index of its first line in the whole log
    objects: tuple[str, ...]  # files with the estimates of its prompts


@dataclass(frozen=True)
class DecidedShard:
    files: list[ShardFile]
    tally: Tally
    bad: list[BadRow]


def total_object(
    item: tuple[str, NDArray[np.int64]], uri: str, policy: LogPolicy, prices: NDArray[np.float64]
) -> Totals:
    """Expected cost and correct answers of the lines whose estimates are in one file, at shadow prices (K,).

    The item is the file, and how many lines have each of its estimates.
    """
    name, counts = item
    estimates = _load(uri, name)
    p, _, cost_usd = policy.read(estimates)
    weights = np.where([reason is None for reason in estimates.reasons], counts, 0)
    return totals(p, cost_usd, weights, policy.eligible(p, cost_usd), prices)


def decide_shard(task: DecideTask, context: DecideContext) -> DecidedShard:
    """Decides for the lines of a shard and writes the decisions."""
    rows = read_shard(task.shard, context.max_prompt_bytes, context.extras)
    estimates = _estimates_of(rows, task, context)
    is_good = np.array([reason is None for reason in estimates.reasons], np.bool_)
    bad = [
        BadRow(*place, row.prompt_id, reason)
        for row, place, reason in zip(rows, task.shard.places, estimates.reasons, strict=True)
        if reason is not None
    ]
    good = np.flatnonzero(is_good)
    if not len(good):
        return DecidedShard([], Tally(), bad)
    rows, estimates = [rows[i] for i in good], estimates.take(good)
    places = [task.shard.places[i] for i in good]
    p, lengths, cost_usd = context.policy.read(estimates)
    chosen = context.policy(p, cost_usd, task.position + good)
    columns = _columns(rows, context)
    used, used_cost_usd = _used(rows, estimates, context)
    lines = Lines(
        estimates.input_tokens.astype(np.int64), p, cost_usd, estimates.percentile, chosen, used, used_cost_usd
    )
    table = _table(rows, places, lines, lengths, columns, context)
    files = _write(table, places, columns, task.shard, context)
    return DecidedShard(files, Tally.of(lines, columns, context.policy.eligible(p, cost_usd)), bad)


def _estimates_of(rows: Sequence[Row], task: DecideTask, context: DecideContext) -> PromptEstimates:
    held = PromptEstimates.concatenate([_load(context.estimates, name) for name in task.objects])
    places = ContentIndex(held.contents).find(contents_of([row.content_digest for row in rows]))
    assert (places >= 0).all(), "a line's prompt was not estimated"
    return held.take(places)


@lru_cache(maxsize=_CACHED_FILES)
def _load(uri: str, name: str) -> PromptEstimates:
    return PromptEstimates.load(uri, name)


def _columns(rows: Sequence[Row], context: DecideContext) -> dict[str, list[str]]:
    places = {name: i for i, name in enumerate(context.extras)}
    columns = {name: [_text(row.extras[places[name]]) for row in rows] for name in context.by}
    if context.time is None:
        return columns
    return {DAY: [day_of(row.extras[places[context.time]]) for row in rows], **columns}


def _text(value: object) -> str:
    if value is None or value == "":
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _used(
    rows: Sequence[Row], estimates: PromptEstimates, context: DecideContext
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The target that each line was sent to and its cost in USD; NO_TARGET and NaN if the log does not have them.

    The cost is the one in the log, or else that of its tokens.
    """
    targets = context.policy.pool.targets
    known = {target.upstream.model: t for t, target in enumerate(targets) if target.upstream and target.upstream.model}
    known |= {target.name: t for t, target in enumerate(targets)}
    model, billed, *counted = (context.extras.index(name) for name in _USED)
    names = (row.extras[model] for row in rows)
    used = np.array([known.get(name, NO_TARGET) if isinstance(name, str) else NO_TARGET for name in names], np.int64)
    cost = np.full(len(rows), np.nan)
    for i, (row, t) in enumerate(zip(rows, used.tolist(), strict=True)):
        cost_usd, (given, made, *cache) = _count(row.extras[billed]), (_count(row.extras[place]) for place in counted)
        if t != NO_TARGET and cost_usd is not None:
            cost[i] = cost_usd
        elif t != NO_TARGET and made is not None:
            input_tokens = float(estimates.input_tokens[i]) if given is None else given
            of_cache = [tokens or 0.0 for tokens in cache]
            is_part = given is not None and sum(of_cache[:2]) <= given and of_cache[2] <= of_cache[1]
            cost[i] = targets[t].cost(input_tokens, made, *(of_cache if is_part else ()))
    return used, cost


def _count(value: object) -> float | None:
    """Parses a token count or a cost, which a CSV file stores as text; None if it is no plausible one."""
    try:
        count = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return count if 0.0 <= count < 1e12 else None


def _table(
    rows: Sequence[Row],
    places: Sequence[RowPosition],
    lines: Lines,
    lengths: NDArray[np.float64],
    columns: dict[str, list[str]],
    context: DecideContext,
) -> pa.Table:
    names = context.policy.pool.target_names

    def by_target(values: NDArray[Any]) -> pa.Array:
        return pa.StructArray.from_arrays([pa.array(column.astype(np.float32)) for column in values.T], names)

    arrays = [
        pa.array([row.prompt_id for row in rows]),
        pa.array([_relative(place.uri, context.log) for place in places]),
        pa.array([place.row for place in places]),
        pa.array([None if t == NO_TARGET else names[t] for t in lines.chosen], pa.string()),
        pa.array(lines.input_tokens, pa.int32()),
        by_target(lines.p_correct),
        by_target(lengths),
        by_target(lines.cost_usd),
        pa.array(lines.percentile, from_pandas=True),
        pa.array([context.router_version] * len(rows)),
        *(pa.array(values, pa.string()) for values in columns.values()),
    ]
    return pa.table(arrays, schema=decisions(names, context.columns))


def _write(
    table: pa.Table, places: Sequence[RowPosition], columns: dict[str, list[str]], shard: Shard, context: DecideContext
) -> list[ShardFile]:
    """Writes one file per partition. Columns that the folder names encode are dropped, as in Hive.

    Readers would otherwise find such a column twice, possibly with two types.
    """
    first = shard.extents[0]
    identity = f"{_relative(first.uri, context.log)}\n{first.first_row}\n{shard.digest}"
    name = f"part-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.parquet"
    if context.partition_by is None:
        folders = [_folder_of(_relative(place.uri, context.log), context) for place in places]
    else:
        keys = [[f"{column}={quote(value, safe='')}" for value in columns[column]] for column in context.partition_by]
        folders = ["/".join(parts) for parts in zip(*keys, strict=True)]
    files = []
    for folder in sorted(set(folders)):
        path = f"{folder}/{name}" if folder else name
        there = table.filter(pa.array([other == folder for other in folders]))
        said = [column for column in table.column_names if column in folder_keys(path)]
        files.append(parquet_objects.write_named(context.out, path, there.drop_columns(said)))
    return files


def _folder_of(file: str, context: DecideContext) -> str:
    """The file's folders in the log. A folder whose key is the name of a decision column gets the prefix `log_`."""
    ours = {name for name in decisions([]).names if name not in context.columns}
    parts = file.split("/")[:-1]
    return "/".join(f"log_{part}" if "=" in part and part.partition("=")[0] in ours else part for part in parts)


def _relative(uri: str, log: str) -> str:
    """A file's path relative to the log, or its name if the log is that file."""
    return uri.removeprefix(log).strip("/") or storage.name(uri)
