"""What a job over a corpus has to do: its rows cut into shards, without those that are bad or repeat a prompt.

A shard is a run of rows in one file. The same corpus always gives the same shards, and a shard's digest names what it
holds, so that an actor that is handed one can write a deterministic object, and what is done already can be told.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.corpus import MAX_PROMPT_BYTES, SUFFIXES, BadRow, Row, files, id_digest, read
from prefill_router.errors import UserError, shown
from prefill_router.schema import PROMPT_ID

Keys = NDArray[np.uint64]  # (n, 3), a row each: 64 bits of its prompt_id, 128 bits of its prompt
Positions = NDArray[np.int64]  # rows, counted over all good rows of the corpus

_KEY_BYTES = 24
_BLOCK = 1 << 14  # rows that numpy works on at a time


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [first_row, first_row + num_rows) of one file, except those that are left out."""

    uri: str
    first_row: int
    num_rows: int
    offset: int  # where the rows begin in bytes (text formats)
    left_out: tuple[int, ...]  # counted from first_row: rows that are bad or repeats
    digest: str  # names the ids and contents of the rows that stay, in their order

    @property
    def rows(self) -> int:
        return self.num_rows - len(self.left_out)

    @property
    def places(self) -> list[int]:
        """The rows that stay, as they are counted in the file."""
        left_out = set(self.left_out)
        return [self.first_row + row for row in range(self.num_rows) if row not in left_out]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shard:
        fields = json.loads(text)
        return cls(**{**fields, "left_out": tuple(fields["left_out"])})


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
        return np.isin(_as_values(keys), _as_values(np.concatenate([keys[:0], *alike, *repeats])))

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
) -> CorpusPlan:
    """Reads the first `limit` rows of a corpus through once and cuts each file into runs of `shard_rows` rows.

    Only the first of several rows with the same content stays in a shard, unless `keep_repeats`. A prompt_id that
    stands twice makes the later row bad; only an id that is the hash of its content, which a row gets that was given
    none, may come again with that content.

    Of the corpus' files those in `only` are read. Bad rows count in a run and in `limit`, so that a row that turns bad
    moves no other. Where a row is looked for again, to name its id, its file is read a second time.

    Memory: 25 bytes a row, 10 more while repeats are looked for, and the ids of rows that are bad or repeated. Raises
    UserError for a corpus that is missing, is empty or holds no good row.
    """
    storage.require(uri, "corpus")
    scan = _scan(files(uri) if only is None else only, shard_rows, limit, max_prompt_bytes)
    if not scan.runs:
        raise UserError(f"{uri}: the corpus is empty: it holds no prompt in {', '.join(SUFFIXES)} files")
    if not len(scan.keys):
        raise UserError(f"{uri}: none of {scan.num_rows:,} rows holds a good prompt; the first: {scan.bad[0].message}")
    kept = np.ones(len(scan.keys), np.bool_)
    clashes = _clashes(scan)
    kept[list(clashes)] = False
    repeated, firsts = _repeated(scan.keys, kept)
    is_first = np.ones(len(scan.keys), np.bool_)
    is_first[repeated] = False
    if not keep_repeats:
        kept &= is_first
    shards, shard_of_run = _cut(scan, kept)
    sources = shard_of_run[scan.runs_of(firsts)]
    return CorpusPlan(
        shards=shards,
        repeats=[] if keep_repeats else _repeats(scan, repeated, sources, shard_rows),
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
    place = shard.first_row, shard.num_rows, shard.offset
    rows = [row for _, _, row in read(shard.uri, *place, max_prompt_bytes, extras)]
    left_out = set(shard.left_out)
    kept = [row for i, row in enumerate(rows) if i not in left_out]
    good = [row for row in kept if isinstance(row, Row)]
    if len(rows) < shard.num_rows or len(good) < len(kept) or _digest(_keys_of(good)) != shard.digest:
        raise _changed(shard.uri)
    return good


def row_keys(prompt_ids: Iterable[str], contents: Iterable[str]) -> Keys:
    """The key of each row, from its id and the hex of its content digest."""
    keys = bytearray()
    for prompt_id, content in zip(prompt_ids, contents, strict=True):
        keys += id_digest(prompt_id) + bytes.fromhex(content)
    return _as_keys(keys)


def _keys_of(rows: Iterable[Row]) -> Keys:
    return _as_keys(b"".join(id_digest(row.prompt_id) + row.content_digest for row in rows))


def _as_keys(data: bytes | bytearray) -> Keys:
    return np.frombuffer(data, "<u8").reshape(-1, 3)


def _as_values(keys: Keys) -> NDArray[np.void]:
    """(n, 3) keys as n values that numpy can compare."""
    return np.ascontiguousarray(keys).view([("", keys.dtype)] * 3)[:, 0]


def _digest(keys: Keys) -> str:
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


def _changed(uri: str) -> UserError:
    return UserError(f"{uri}: holds other rows than when the job began: it must not change under a job")


# --- the one pass over the corpus --------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Consecutive rows of one file; `start` is the position of its first good row."""

    uri: str
    first_row: int
    num_rows: int
    offset: int
    bad: tuple[int, ...]  # counted from first_row
    start: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows - len(self.bad)

    def good_rows(self) -> NDArray[np.int64]:
        """The row of each position, counted from first_row."""
        return np.delete(np.arange(self.num_rows), np.array(self.bad, np.int64))


@dataclass(frozen=True)
class _Scan:
    """What the pass has seen: every run, the key of every good row, and the bad rows."""

    runs: list[_Run]
    keys: Keys
    bad: list[BadRow]
    max_prompt_bytes: int

    @property
    def num_rows(self) -> int:
        return len(self.keys) + len(self.bad)

    @cached_property
    def _starts(self) -> Positions:
        return np.array([run.start for run in self.runs])

    def runs_of(self, positions: Positions) -> NDArray[np.int64]:
        """The index of the run that holds each position."""
        return np.searchsorted(self._starts, positions, side="right") - 1


def _scan(uris: Sequence[str], shard_rows: int, limit: int | None, max_prompt_bytes: int) -> _Scan:
    runs: list[_Run] = []
    keys = bytearray()
    bad: list[BadRow] = []
    num_rows = 0
    for file in uris:
        rows = read(file, num_rows=None if limit is None else limit - num_rows, max_prompt_bytes=max_prompt_bytes)
        while block := list(itertools.islice(rows, shard_rows)):
            first_row, offset, _ = block[0]
            start, unfit = len(keys) // _KEY_BYTES, []
            for i, (_, _, row) in enumerate(block):
                if isinstance(row, Row):
                    keys += id_digest(row.prompt_id) + row.content_digest
                else:
                    unfit.append(i)
                    bad.append(row)
            runs.append(_Run(file, first_row, len(block), offset, tuple(unfit), start))
            num_rows += len(block)
        if num_rows == limit:
            break
    return _Scan(runs, _as_keys(keys), bad, max_prompt_bytes)


def _cut(scan: _Scan, kept: NDArray[np.bool_]) -> tuple[list[Shard], NDArray[np.int64]]:
    """A shard of every run that keeps a row, and the shard of each run."""
    shards: list[Shard] = []
    shard_of_run = np.full(len(scan.runs), -1)
    for i, run in enumerate(scan.runs):
        stays = kept[run.start : run.end]
        if stays.any():
            shard_of_run[i] = len(shards)
            digest = _digest(scan.keys[run.start : run.end][stays])
            shards.append(Shard(run.uri, run.first_row, run.num_rows, run.offset, _left_out(run, stays), digest))
    return shards, shard_of_run


def _left_out(run: _Run, stays: NDArray[np.bool_]) -> tuple[int, ...]:
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


def _clashes(scan: _Scan) -> dict[int, BadRow]:
    """The rows, by position, whose prompt_id stands earlier, except for a hash of the same content."""
    positions = _standing_twice(scan.keys[:, 0])
    given = positions[~_has_own_hash(scan.keys[positions])]
    positions = positions[np.isin(scan.keys[positions, 0], scan.keys[given, 0])]
    contents: dict[str, str] = {}  # of the first row with each id
    clashes: dict[int, BadRow] = {}
    rows = zip(positions.tolist(), _prompt_ids(scan, positions), _contents(scan.keys[positions]), strict=True)
    for position, prompt_id, content in rows:
        if prompt_id in contents and not prompt_id == content == contents[prompt_id]:
            clashes[position] = _clash(scan, position, prompt_id)
        contents.setdefault(prompt_id, content)
    return clashes


def in_order(bad: Iterable[BadRow]) -> list[BadRow]:
    """Bad rows in the order of the corpus, whose files are sorted."""
    return sorted(bad, key=lambda row: (row.uri, row.row))


def _clash(scan: _Scan, position: int, prompt_id: str) -> BadRow:
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


def _repeats(scan: _Scan, positions: Positions, sources: NDArray[np.int64], shard_rows: int) -> list[Repeats]:
    prompt_ids, contents = _prompt_ids(scan, positions), _contents(scan.keys[positions])
    repeats = []
    for start in range(0, len(positions), shard_rows):
        part = slice(start, start + shard_rows)
        digest = _digest(scan.keys[positions[part]])
        repeats.append(Repeats(tuple(prompt_ids[part]), tuple(contents[part]), tuple(sources[part].tolist()), digest))
    return repeats


# --- ids, which the pass did not keep ----------------------------------------------------------------------------


def _contents(keys: Keys) -> list[str]:
    return [key.tobytes().hex() for key in keys[:, 1:]]


def _has_own_hash(keys: Keys) -> NDArray[np.bool_]:
    """Whether each row's id is the hash of its content."""
    hashes = bytearray()
    for content in keys[:, 1:]:
        hashes += id_digest(content.tobytes().hex())
    return np.asarray(np.frombuffer(hashes, "<u8") == keys[:, 0])


def _prompt_ids(scan: _Scan, positions: Positions) -> list[str]:
    """The id of each row. The files that hold the rows are read again, unless the ids are hashes."""
    keys = scan.keys[positions]
    ids = dict(zip(positions.tolist(), _contents(keys), strict=True))
    given = np.sort(positions[~_has_own_hash(keys)])
    runs = [scan.runs[i] for i in np.unique(scan.runs_of(given))]
    for _, of_file in itertools.groupby(runs, key=lambda run: run.uri):
        ids.update(_ids_in_file(scan, list(of_file), given))
    return list(ids.values())


def _ids_in_file(scan: _Scan, runs: list[_Run], positions: Positions) -> dict[int, str]:
    """The ids of those rows that lie in the runs of one file, read from the first run to the last."""
    first, last = runs[0], runs[-1]
    num_rows = last.first_row + last.num_rows - first.first_row
    rows = read(first.uri, first.first_row, num_rows, first.offset, scan.max_prompt_bytes)
    good = (row for _, _, row in rows if isinstance(row, Row))
    wanted = set(positions[(positions >= first.start) & (positions < last.end)].tolist())
    ids = {position: row.prompt_id for position, row in enumerate(good, first.start) if position in wanted}
    if len(ids) < len(wanted) or any(id_digest(ids[i]) != scan.keys[i, 0].tobytes() for i in ids):
        raise _changed(first.uri)
    return ids
