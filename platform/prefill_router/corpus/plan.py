"""What a job over a corpus has to do: its rows cut into shards, without those that are bad or repeat a prompt.

A shard is a run of rows in one file, or several files that have fewer rows than a shard. The same corpus always gives
the same shards, and a shard's digest names what it holds, so that an actor that is handed one can write a deterministic
object, and what is done already can be told.
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
from prefill_router.common.errors import UserError, shown
from prefill_router.common.schema import PROMPT_ID
from prefill_router.corpus.formats import FORMATS
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, BadRow, Row, files, read
from prefill_router.corpus.row_keys import Keys, as_values, content_hashes, digest_of, have_own_hash, keys_of, row_keys
from prefill_router.corpus.scan import Positions, Run, Scan, Spread, changed, scan_files

_READERS = 16  # of files at a time
_BLOCK = 1 << 14  # rows that numpy works on at a time


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows [first_row, first_row + num_rows) of one file, except those that are left out."""

    uri: str
    first_row: int
    num_rows: int
    offset: int  # where the rows begin in bytes (text formats)
    left_out: tuple[int, ...]  # counted from first_row: rows that are bad or repeats

    @property
    def places(self) -> list[RowPosition]:
        """The rows that stay, as they are counted in the file."""
        left_out = set(self.left_out)
        return [RowPosition(self.uri, self.first_row + row) for row in range(self.num_rows) if row not in left_out]


class RowPosition(NamedTuple):
    """Where a row stands; `row` counts from 0 in its file."""

    uri: str
    row: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of a corpus that are worked on together."""

    extents: tuple[Extent, ...]
    digest: str  # names the ids and contents of the rows that stay, in their order

    @property
    def rows(self) -> int:
        return sum(extent.num_rows - len(extent.left_out) for extent in self.extents)

    @property
    def places(self) -> list[RowPosition]:
        """Of the rows that stay."""
        return [place for extent in self.extents for place in extent.places]

    def located(self) -> Shard:
        """The same for a process in another folder."""
        return replace(self, extents=tuple(replace(e, uri=storage.absolute(e.uri)) for e in self.extents))


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows whose prompt stands earlier in the corpus, under the same id or another."""

    prompt_ids: tuple[str, ...]
    contents: tuple[str, ...]  # content digests, in hex
    sources: tuple[int, ...]  # the shards that hold the first occurrences, as indices in the plan
    digest: str  # as of a Shard


@dataclass(frozen=True, slots=True, eq=False)
class CorpusPlan:
    """The shards of a corpus, and what was left out of them. Every row is in a shard, in the repeats or bad."""

    shards: list[Shard]
    repeats: list[Repeats]  # in the order of their first occurrences, so that each needs few shards
    bad: list[BadRow]  # in the order of the corpus
    num_rows: int  # all that were read, bad ones too
    num_repeated: int  # rows whose prompt stands earlier, whether they are left out or not
    keys: Keys  # of the rows in shards, in their order, as `row_keys` gives them
    is_first: NDArray[np.bool_]  # of the same rows: does none before it hold the same prompt?

    def spans(self) -> Iterator[tuple[Shard, slice]]:
        """Each shard with the places of its rows among the keys."""
        start = 0
        for shard in self.shards:
            yield shard, slice(start, start + shard.rows)
            start += shard.rows

    def has(self, keys: Keys) -> NDArray[np.bool_]:
        """Which rows (n, 3) stand in the corpus, in a shard or repeated, with the same id and prompt."""
        ids = np.sort(keys[:, 0])
        blocks = (self.keys[start : start + _BLOCK] for start in range(0, len(self.keys), _BLOCK))
        alike = [block[_is_in(block[:, 0], ids)] for block in blocks]  # of many, the few that may be the same
        repeats = (row_keys(repeats.prompt_ids, repeats.contents) for repeats in self.repeats)
        return np.isin(as_values(keys), as_values(np.concatenate([keys[:0], *alike, *repeats])))

    def check_bad(self, bad: Sequence[BadRow], max_fraction: float) -> None:
        """Raises UserError where more of the corpus is bad than the user allows, before or after it was encoded."""
        if len(bad) > max_fraction * self.num_rows or len(bad) == self.num_rows:
            raise UserError(
                f"{len(bad):,} of {self.num_rows:,} rows are bad, more than --max-bad-fraction "
                f"{max_fraction:g} allows; {bad[0].message}"
            )


def plan(
    uri: str,
    shard_rows: int,
    limit: int | None = None,
    max_prompt_bytes: int = MAX_PROMPT_BYTES,
    *,
    keep_repeats: bool = False,
    only: Sequence[str] | None = None,
    spread: Spread = map,
) -> CorpusPlan:
    """Reads the first `limit` rows of a corpus through once and cuts each file into runs of `shard_rows` rows.

    Files that have fewer rows than a shard share one with those that follow.

    Only the first of several rows with the same content stays in a shard, unless `keep_repeats`. A prompt_id that
    stands twice makes the later row bad; only an id that is the hash of its content, which a row gets that was given
    none, may come again with that content.

    Of the corpus' files those in `only` are read, by `spread`: here, or all over a cluster. Bad rows count in a run and
    in `limit`, so that a row that turns bad moves no other. Where a row is looked for again, to name its id, its file
    is read a second time.

    Memory: 25 bytes a row, 10 more while repeats are looked for, and the ids of rows that are bad or repeated. Raises
    UserError for a corpus that is missing, is empty or holds no good row.
    """
    storage.require(uri, "corpus")
    scan = scan_files(files(uri) if only is None else only, shard_rows, limit, max_prompt_bytes, spread)
    if not scan.runs:
        raise UserError(f"{uri}: the corpus is empty: it holds no prompt in files of {FORMATS}")
    if not len(scan.keys):
        raise UserError(f"{uri}: none of {scan.num_rows:,} rows holds a good prompt; the first: {scan.bad[0].message}")
    kept = np.ones(len(scan.keys), np.bool_)
    clashes = _clashes(scan, spread)
    kept[list(clashes)] = False
    repeated, firsts = _repeated(scan.keys, kept)
    is_first = np.ones(len(scan.keys), np.bool_)
    is_first[repeated] = False
    if not keep_repeats:
        kept &= is_first
    shards, shard_of_run = _cut(scan, kept, shard_rows)
    sources = shard_of_run[scan.runs_of(firsts)]
    return CorpusPlan(
        shards=shards,
        repeats=[] if keep_repeats else _repeats(scan, repeated, sources, shard_rows, spread),
        bad=in_order([*scan.bad, *clashes.values()]),
        num_rows=scan.num_rows,
        num_repeated=len(repeated),
        is_first=is_first[kept],
        keys=_compacted(scan.keys, kept),  # last, for it moves them
    )


def read_shard(shard: Shard, max_prompt_bytes: int = MAX_PROMPT_BYTES, extras: Sequence[str] = ()) -> list[Row]:
    """The rows that stay in a shard, with the values of the columns `extras`.

    Raises UserError where the file is not the one that was planned.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        one = partial(_read_extent, max_prompt_bytes=max_prompt_bytes, extras=extras)
        rows = [row for part in pool.map(one, shard.extents) for row in part]
    if digest_of(keys_of(rows)) != shard.digest:
        raise changed(" or ".join(extent.uri for extent in shard.extents[:3]))
    return rows


def _read_extent(extent: Extent, max_prompt_bytes: int, extras: Sequence[str]) -> list[Row]:
    place = extent.first_row, extent.num_rows, extent.offset
    rows = [row for _, _, row in read(extent.uri, *place, max_prompt_bytes, extras)]
    left_out = set(extent.left_out)
    kept = [row for i, row in enumerate(rows) if i not in left_out]
    good = [row for row in kept if isinstance(row, Row)]
    if len(rows) < extent.num_rows or len(good) < len(kept):
        raise changed(extent.uri)
    return good


def _cut(scan: Scan, kept: NDArray[np.bool_], shard_rows: int) -> tuple[list[Shard], NDArray[np.int64]]:
    """A shard of each group of runs that keeps a row, and the shard of each run."""
    shards: list[Shard] = []
    shard_of_run = np.full(len(scan.runs), -1)
    for group in _groups(scan.runs, shard_rows):
        runs = [(i, scan.runs[i]) for i in group]
        staying = [(i, run, kept[run.start : run.end]) for i, run in runs if kept[run.start : run.end].any()]
        if staying:
            shard_of_run[[i for i, _, _ in staying]] = len(shards)
            extents = (Extent(r.uri, r.first_row, r.num_rows, r.offset, _left_out(r, stays)) for _, r, stays in staying)
            keys = np.concatenate([scan.keys[run.start : run.end][stays] for _, run, stays in staying])
            shards.append(Shard(tuple(extents), digest_of(keys)))
    return shards, shard_of_run


def _groups(runs: Sequence[Run], shard_rows: int) -> Iterator[list[int]]:
    """Runs by themselves, but those together, up to `shard_rows` rows, that are small files which follow each other."""
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


def _left_out(run: Run, stays: NDArray[np.bool_]) -> tuple[int, ...]:
    if stays.all():
        return run.bad
    return tuple(sorted({*run.bad, *run.good_rows()[~stays].tolist()}))


def _compacted(keys: Keys, kept: NDArray[np.bool_]) -> Keys:
    """`keys[kept]`, moved together in place: a copy would take as much memory again."""
    end = 0
    for start in range(0, len(keys), _BLOCK):
        stay = keys[start : start + _BLOCK][kept[start : start + _BLOCK]]
        keys[end : end + len(stay)] = stay
        end += len(stay)
    return keys[:end]


# --- rows that come again ----------------------------------------------------------------------------------------


def _standing_twice(values: NDArray[np.uint64]) -> Positions:
    """The positions, ascending, of the values that stand more than once. To sort them, too, would double the memory."""
    ordered = np.sort(values)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    blocks = [
        start + np.flatnonzero(_is_in(values[start : start + _BLOCK], twice)) for start in range(0, len(values), _BLOCK)
    ]
    return np.concatenate(blocks)


def _is_in(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """As `np.isin`, which would sort all of `ordered` again for every block of values."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(ordered, values)
    return np.asarray(ordered[np.minimum(places, len(ordered) - 1)] == values)


def _clashes(scan: Scan, spread: Spread) -> dict[int, BadRow]:
    """The rows, by position, whose prompt_id stands earlier, except for a hash of the same content."""
    positions = _standing_twice(scan.keys[:, 0])
    given = positions[~have_own_hash(scan.keys[positions])]
    positions = positions[np.isin(scan.keys[positions, 0], scan.keys[given, 0])]
    contents: dict[str, str] = {}  # of the first row with each id
    clashes: dict[int, BadRow] = {}
    ids, hashes = scan.prompt_ids(positions, spread), content_hashes(scan.keys[positions])
    for position, prompt_id, content in zip(positions.tolist(), ids, hashes, strict=True):
        if prompt_id in contents and not prompt_id == content == contents[prompt_id]:
            clashes[position] = _clash(scan, position, prompt_id)
        contents.setdefault(prompt_id, content)
    return clashes


def in_order(bad: Iterable[BadRow]) -> list[BadRow]:
    """Bad rows in the order of the corpus, whose files are sorted."""
    return sorted(bad, key=lambda row: (row.uri, row.row))


def _clash(scan: Scan, position: int, prompt_id: str) -> BadRow:
    run = scan.runs[int(scan.runs_of(np.array(position)))]
    row = run.first_row + int(run.good_rows()[position - run.start])
    reason = f"{PROMPT_ID} {shown(prompt_id)} stands more than once; ids must be unique"
    return BadRow(run.uri, row, prompt_id, reason)


def _repeated(keys: Keys, kept: NDArray[np.bool_]) -> tuple[Positions, Positions]:
    """The kept rows whose content stands earlier, and the first row with it of each, in the order of those."""
    positions = _standing_twice(keys[:, 1])
    positions = positions[kept[positions]]
    positions = positions[np.lexsort((keys[positions, 2], keys[positions, 1]))]  # stable: the first stays first
    contents = keys[positions, 1:]
    is_first = np.ones(len(positions), np.bool_)
    is_first[1:] = (contents[1:] != contents[:-1]).any(axis=1)
    firsts = positions[is_first][np.cumsum(is_first) - 1]
    order = np.lexsort((positions[~is_first], firsts[~is_first]))
    return positions[~is_first][order], firsts[~is_first][order]


def _repeats(
    scan: Scan, positions: Positions, sources: NDArray[np.int64], shard_rows: int, spread: Spread
) -> list[Repeats]:
    prompt_ids, contents = scan.prompt_ids(positions, spread), content_hashes(scan.keys[positions])
    repeats = []
    for start in range(0, len(positions), shard_rows):
        part = slice(start, start + shard_rows)
        digest = digest_of(scan.keys[positions[part]])
        repeats.append(Repeats(tuple(prompt_ids[part]), tuple(contents[part]), tuple(sources[part].tolist()), digest))
    return repeats
