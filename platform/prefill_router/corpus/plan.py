"""Plans a job over a corpus: cuts its rows into shards, without invalid rows and repeated prompts.

A shard is a run of rows of one file, or several files that are smaller than a shard. The same corpus always gives the
same shards. A shard's digest identifies its content, so that a worker can write a deterministic object for it, and a
restarted job finds the shards that are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.common.console import doing
from prefill_router.common.errors import UserError, shown
from prefill_router.common.schema import PROMPT_ID
from prefill_router.corpus.formats import FORMATS
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, BadRow, Row, files, read
from prefill_router.corpus.row_keys import (
    RowKeys,
    as_values,
    content_hashes,
    digest_of,
    have_own_hash,
    keys_of,
    row_keys,
)
from prefill_router.corpus.scan import Positions, Run, Scan, Spread, changed, scan_files

SHARD_ROWS = 256  # by default
_NUM_READERS = 16  # threads that read the files of one shard
_BLOCK = 1 << 14  # rows that numpy processes at a time


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows [first_row, first_row + num_rows) of one file, except `left_out`."""

    uri: str
    first_row: int
    num_rows: int
    offset: int  # the byte where the rows begin (text formats)
    left_out: tuple[int, ...]  # counted from first_row: invalid and repeated rows

    @property
    def places(self) -> list[RowPosition]:
        """The positions of the rows that are kept."""
        left_out = set(self.left_out)
        return [RowPosition(self.uri, self.first_row + row) for row in range(self.num_rows) if row not in left_out]


class RowPosition(NamedTuple):
    """The position of a row; `row` counts from 0 in its file."""

    uri: str
    row: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of a corpus that are processed together."""

    extents: tuple[Extent, ...]
    digest: str  # of the ids and contents of the rows that are kept, in order

    @property
    def rows(self) -> int:
        return sum(extent.num_rows - len(extent.left_out) for extent in self.extents)

    @property
    def places(self) -> list[RowPosition]:
        """The positions of the rows that are kept."""
        return [place for extent in self.extents for place in extent.places]

    def located(self) -> Shard:
        """The same shard with absolute paths, for a process in another folder."""
        return replace(self, extents=tuple(replace(e, uri=storage.absolute(e.uri)) for e in self.extents))


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows whose prompt occurs earlier in the corpus, under the same id or another."""

    prompt_ids: tuple[str, ...]
    contents: tuple[str, ...]  # content digests, in hexadecimal
    sources: tuple[int, ...]  # indices of the shards with the first occurrences
    digest: str  # as in a Shard


@dataclass(frozen=True, slots=True, eq=False)
class CorpusPlan:
    """The shards of a corpus. Each row is in a shard, in `repeats` or in `bad`."""

    shards: list[Shard]
    repeats: list[Repeats]  # in the order of their first occurrences, so that each needs few shards
    bad: list[BadRow]  # invalid rows, in the order of the corpus
    num_rows: int  # number of rows read, including invalid ones
    num_repeated: int  # number of rows whose prompt occurs earlier, whether they are left out or not
    keys: RowKeys  # of the rows in shards, in order, as returned by `row_keys`
    is_first: NDArray[np.bool_]  # for the same rows: whether no earlier row holds the same prompt

    def spans(self) -> Iterator[tuple[Shard, slice]]:
        """Yields each shard with the slice of its rows in `keys`."""
        start = 0
        for shard in self.shards:
            yield shard, slice(start, start + shard.rows)
            start += shard.rows

    def has(self, keys: RowKeys) -> NDArray[np.bool_]:
        """Whether each row (n, 3) is in the corpus, in a shard or repeated, with the same id and prompt."""
        ids = np.sort(keys[:, 0])
        blocks = (self.keys[start : start + _BLOCK] for start in range(0, len(self.keys), _BLOCK))
        candidates = [block[_is_in(block[:, 0], ids)] for block in blocks]
        repeats = (row_keys(repeats.prompt_ids, repeats.contents) for repeats in self.repeats)
        return np.isin(as_values(keys), as_values(np.concatenate([keys[:0], *candidates, *repeats])))

    def check_bad(self, bad: Sequence[BadRow], max_fraction: float) -> None:
        """Raises UserError if the invalid rows `bad` exceed `max_fraction` of the corpus, or are all of it."""
        if len(bad) > max_fraction * self.num_rows or len(bad) == self.num_rows:
            raise UserError(
                f"{len(bad):,} of {self.num_rows:,} rows are invalid, more than --max-bad-fraction "
                f"{max_fraction:g} allows: {bad[0].message}"
            )


@doing("reading the corpus")
def plan(
    uri: str,
    shard_rows: int | None = None,
    limit: int | None = None,
    max_prompt_bytes: int = MAX_PROMPT_BYTES,
    *,
    keep_repeats: bool = False,
    only: Sequence[str] | None = None,
    spread: Spread = map,
    default_rows: int = SHARD_ROWS,
) -> CorpusPlan:
    """Reads the first `limit` rows of a corpus once and cuts each file into runs of `shard_rows` rows.

    By default runs have `default_rows` rows, but fewer at the start of the first file: a short job then shows progress.

    Consecutive files with fewer rows than a shard share one. Of rows with the same content, only the first is kept,
    unless `keep_repeats`. A row with the prompt_id of an earlier row is invalid, unless the id is the hash of the
    content of both, which is the id of a row without a prompt_id.

    Reads all files, or `only` some, and distributes the work with `spread`. Invalid rows count in a run and in
    `limit`, so that a row that becomes invalid does not move others. Files with conflicting
    or repeated rows are read twice, unless their ids are hashes.

    Memory: 25 bytes per row, 10 more while repeats are searched, and the ids of repeated and conflicting rows. Raises
    UserError if the corpus is missing, is empty or has no valid row.
    """
    storage.require(uri, "corpus")
    uris, grow = files(uri) if only is None else only, shard_rows is None
    shard_rows = default_rows if shard_rows is None else shard_rows
    scan = scan_files(uris, shard_rows, limit, max_prompt_bytes, spread, grow=grow)
    if not scan.runs:
        raise UserError(f"{uri}: the corpus is empty: add prompts in a supported format: {FORMATS}")
    if not len(scan.keys):
        raise UserError(f"{uri}: none of {scan.num_rows:,} rows is valid; the first: {scan.bad[0].message}")
    kept = np.ones(len(scan.keys), np.bool_)
    conflicts = _id_conflicts(scan, spread)
    kept[list(conflicts)] = False
    repeated, firsts = _find_repeats(scan.keys, kept)
    is_first = np.ones(len(scan.keys), np.bool_)
    is_first[repeated] = False
    if not keep_repeats:
        kept &= is_first
    shards, shard_of_run = _to_shards(scan, kept, shard_rows)
    sources = shard_of_run[scan.runs_of(firsts)]
    return CorpusPlan(
        shards=shards,
        repeats=[] if keep_repeats else _to_repeats(scan, repeated, sources, shard_rows, spread),
        bad=in_order([*scan.bad, *conflicts.values()]),
        num_rows=scan.num_rows,
        num_repeated=len(repeated),
        is_first=is_first[kept],
        keys=_compacted(scan.keys, kept),  # last, because it moves the keys in place
    )


def read_shard(shard: Shard, max_prompt_bytes: int = MAX_PROMPT_BYTES, extras: Sequence[str] = ()) -> list[Row]:
    """Reads the kept rows of a shard, with the values of the columns `extras`.

    Raises UserError if the files have changed since they were planned.
    """
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        read_one = partial(_read_extent, max_prompt_bytes=max_prompt_bytes, extras=extras)
        rows = [row for part in pool.map(read_one, shard.extents) for row in part]
    if digest_of(keys_of(rows)) != shard.digest:
        raise changed(" or ".join(extent.uri for extent in shard.extents[:3]))
    return rows


def _read_extent(extent: Extent, max_prompt_bytes: int, extras: Sequence[str]) -> list[Row]:
    span = extent.first_row, extent.num_rows, extent.offset
    rows = [row for _, _, row in read(extent.uri, *span, max_prompt_bytes, extras)]
    left_out = set(extent.left_out)
    kept = [row for i, row in enumerate(rows) if i not in left_out]
    valid = [row for row in kept if isinstance(row, Row)]
    if len(rows) < extent.num_rows or len(valid) < len(kept):
        raise changed(extent.uri)
    return valid


def _to_shards(scan: Scan, kept: NDArray[np.bool_], shard_rows: int) -> tuple[list[Shard], NDArray[np.int64]]:
    """Returns a shard for each group of runs with a kept row, and the shard of each run."""
    shards: list[Shard] = []
    shard_of_run = np.full(len(scan.runs), -1)
    for group in _group_runs(scan.runs, shard_rows):
        runs = [(i, scan.runs[i]) for i in group]
        used = [(i, run, kept[run.start : run.end]) for i, run in runs if kept[run.start : run.end].any()]
        if used:
            shard_of_run[[i for i, _, _ in used]] = len(shards)
            extents = (Extent(r.uri, r.first_row, r.num_rows, r.offset, _left_out(r, mask)) for _, r, mask in used)
            keys = np.concatenate([scan.keys[run.start : run.end][mask] for _, run, mask in used])
            shards.append(Shard(tuple(extents), digest_of(keys)))
    return shards, shard_of_run


def _group_runs(runs: Sequence[Run], shard_rows: int) -> Iterator[list[int]]:
    """Yields the indices of runs that share a shard: consecutive small files, up to `shard_rows`; else a single run."""
    group: list[int] = []
    num_rows = 0
    for i, run in enumerate(runs):
        is_alone = run.first_row > 0 or (i + 1 < len(runs) and runs[i + 1].uri == run.uri)
        if group and (is_alone or num_rows + run.num_rows > shard_rows):
            yield group
            group, num_rows = [], 0
        if is_alone:
            yield [i]
        else:
            group.append(i)
            num_rows += run.num_rows
    if group:
        yield group


def _left_out(run: Run, kept: NDArray[np.bool_]) -> tuple[int, ...]:
    """The rows of a run, counted from its first, that are not kept; `kept` is about its valid rows."""
    if kept.all():
        return run.bad
    return tuple(sorted({*run.bad, *run.good_rows()[~kept].tolist()}))


def _compacted(keys: RowKeys, kept: NDArray[np.bool_]) -> RowKeys:
    """Returns `keys[kept]`, compacted in place: a copy would double the memory."""
    end = 0
    for start in range(0, len(keys), _BLOCK):
        block = keys[start : start + _BLOCK][kept[start : start + _BLOCK]]
        keys[end : end + len(block)] = block
        end += len(block)
    return keys[:end]


# --- repeated prompts and conflicting ids ------------------------------------------------------------------------


def _duplicated(values: NDArray[np.uint64]) -> Positions:
    """The ascending positions of values that occur more than once; `argsort` would take twice the memory."""
    ordered = np.sort(values)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    blocks = [
        start + np.flatnonzero(_is_in(values[start : start + _BLOCK], twice)) for start in range(0, len(values), _BLOCK)
    ]
    return np.concatenate(blocks)


def _is_in(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Like `np.isin`, which would sort `ordered` again for each block of values."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    indices = np.searchsorted(ordered, values)
    return np.asarray(ordered[np.minimum(indices, len(ordered) - 1)] == values)


def _id_conflicts(scan: Scan, spread: Spread) -> dict[int, BadRow]:
    """The rows, by position, whose prompt_id occurs earlier, unless it is the hash of the content of both."""
    positions = _duplicated(scan.keys[:, 0])
    given = positions[~have_own_hash(scan.keys[positions])]
    positions = positions[np.isin(scan.keys[positions, 0], scan.keys[given, 0])]
    contents: dict[str, str] = {}  # of the first row with each id
    conflicts: dict[int, BadRow] = {}
    ids, hashes = scan.prompt_ids(positions, spread), content_hashes(scan.keys[positions])
    for position, prompt_id, content in zip(positions.tolist(), ids, hashes, strict=True):
        if prompt_id in contents and not prompt_id == content == contents[prompt_id]:
            conflicts[position] = _id_conflict(scan, position, prompt_id)
        contents.setdefault(prompt_id, content)
    return conflicts


def in_order(bad: Iterable[BadRow]) -> list[BadRow]:
    """Sorts invalid rows in the order of the corpus: by file, then by row."""
    return sorted(bad, key=lambda row: (row.uri, row.row))


def _id_conflict(scan: Scan, position: int, prompt_id: str) -> BadRow:
    run = scan.runs[int(scan.runs_of(np.array(position)))]
    row = run.first_row + int(run.good_rows()[position - run.start])
    reason = f"{PROMPT_ID} {shown(prompt_id)} occurs more than once: ids must be unique"
    return BadRow(run.uri, row, prompt_id, reason)


def _find_repeats(keys: RowKeys, kept: NDArray[np.bool_]) -> tuple[Positions, Positions]:
    """The kept rows whose content occurs earlier, and the first row with that content, sorted by the latter."""
    positions = _duplicated(keys[:, 1])
    positions = positions[kept[positions]]
    positions = positions[np.lexsort((keys[positions, 2], keys[positions, 1]))]  # stable: the first stays first
    contents = keys[positions, 1:]
    is_first = np.ones(len(positions), np.bool_)
    is_first[1:] = (contents[1:] != contents[:-1]).any(axis=1)
    firsts = positions[is_first][np.cumsum(is_first) - 1]
    order = np.lexsort((positions[~is_first], firsts[~is_first]))
    return positions[~is_first][order], firsts[~is_first][order]


def _to_repeats(
    scan: Scan, positions: Positions, sources: NDArray[np.int64], shard_rows: int, spread: Spread
) -> list[Repeats]:
    prompt_ids, contents = scan.prompt_ids(positions, spread), content_hashes(scan.keys[positions])
    repeats = []
    for start in range(0, len(positions), shard_rows):
        part = slice(start, start + shard_rows)
        digest = digest_of(scan.keys[positions[part]])
        repeats.append(Repeats(tuple(prompt_ids[part]), tuple(contents[part]), tuple(sources[part].tolist()), digest))
    return repeats
