"""The one pass over a corpus: each file's runs of rows and the keys of the good ones, and later the ids of a few."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.errors import UserError
from prefill_router.corpus.reader import BadRow, Row, read
from prefill_router.corpus.row_keys import KEY_BYTES, Keys, as_keys, content_hashes, have_own_hash, key_of

T = TypeVar("T")
R = TypeVar("R")

_GROUPS, _FILES_AT_ONCE, _READERS = 64, 64, 8  # where there are many files, so many are read by one call

Positions = NDArray[np.int64]  # rows, counted over all good rows of the corpus


class Spread(Protocol):
    """How work on many files is done: as `map` does it, here, or with the same results by a whole cluster."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


class Run(NamedTuple):
    """Consecutive rows of one file; `start` is the position of its first good row."""

    uri: str
    first_row: int
    num_rows: int
    offset: int  # where the rows begin in bytes (text formats)
    bad: tuple[int, ...]  # counted from first_row
    start: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows - len(self.bad)

    def good_rows(self) -> NDArray[np.int64]:
        """The row of each position, counted from first_row."""
        return np.delete(np.arange(self.num_rows), np.array(self.bad, np.int64))


@dataclass
class FileScan:
    """What the pass has seen of one file, or of several that follow each other; positions count from 0."""

    runs: list[Run]
    keys: bytearray
    bad: list[BadRow]

    def extend(self, other: FileScan) -> None:
        """Adds what comes behind."""
        start = len(self.keys) // KEY_BYTES
        self.runs.extend(run._replace(start=start + run.start) for run in other.runs)
        self.keys += other.keys
        self.bad.extend(other.bad)


@dataclass(frozen=True)
class Scan:
    """What the pass has seen: every run, the key of every good row, and the bad rows."""

    runs: list[Run]
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

    def prompt_ids(self, positions: Positions, spread: Spread) -> list[str]:
        """The id of each row. The files that hold the rows are read again, unless the ids are hashes."""
        keys = self.keys[positions]
        ids = dict(zip(positions.tolist(), content_hashes(keys), strict=True))
        given = np.sort(positions[~have_own_hash(keys)])
        runs = [self.runs[i] for i in np.unique(self.runs_of(given))]
        wanted = []
        for _, of_file in itertools.groupby(runs, key=lambda run: run.uri):
            span = list(of_file)
            there = given[(given >= span[0].start) & (given < span[-1].end)]
            wanted.append(_Wanted(span[0], span[-1], there, self.keys[there]))
        for found in spread(partial(_read_ids, max_prompt_bytes=self.max_prompt_bytes), wanted):
            ids.update(found)
        return list(ids.values())


def scan_files(uris: Sequence[str], shard_rows: int, limit: int | None, max_prompt_bytes: int, spread: Spread) -> Scan:
    """Reads the first `limit` rows of some files through once, in runs of `shard_rows`."""
    one = partial(scan_file, shard_rows=shard_rows, max_prompt_bytes=max_prompt_bytes)
    if limit is None:
        size = max(1, min(_FILES_AT_ONCE, len(uris) // _GROUPS))
        parts = spread(partial(_scan_group, one), [uris[i : i + size] for i in range(0, len(uris), size)])
    else:
        parts = _up_to(limit, one, uris)
    whole = next(parts, FileScan([], bytearray(), []))  # a copy of the first would take as much memory again
    for part in parts:
        whole.extend(part)
    return Scan(whole.runs, as_keys(whole.keys), whole.bad, max_prompt_bytes)


def _scan_group(one: Callable[[str], FileScan], uris: Sequence[str]) -> FileScan:
    """Many small files are mostly waited for."""
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(one, uris)
        whole = next(parts)
        for part in parts:
            whole.extend(part)
    return whole


def _up_to(limit: int, one: Callable[..., FileScan], uris: Sequence[str]) -> Iterator[FileScan]:
    """One file after the other, until there are enough rows."""
    for uri in uris:
        part = one(uri, limit=limit)
        yield part
        limit -= sum(run.num_rows for run in part.runs)
        if not limit:
            return


def scan_file(uri: str, shard_rows: int, max_prompt_bytes: int, limit: int | None = None) -> FileScan:
    found = FileScan([], bytearray(), [])
    rows = read(uri, num_rows=limit, max_prompt_bytes=max_prompt_bytes)
    while block := list(itertools.islice(rows, shard_rows)):
        first_row, offset, _ = block[0]
        start, unfit = len(found.keys) // KEY_BYTES, []
        for i, (_, _, row) in enumerate(block):
            if isinstance(row, Row):
                found.keys += key_of(row)
            else:
                unfit.append(i)
                found.bad.append(row)
        found.runs.append(Run(uri, first_row, len(block), offset, tuple(unfit), start))
    return found


class _Wanted(NamedTuple):
    """Rows of one file, from its run `first` to `last`, whose ids are wanted."""

    first: Run
    last: Run
    positions: Positions
    keys: Keys


def _read_ids(wanted: _Wanted, max_prompt_bytes: int) -> dict[int, str]:
    """Raises UserError where the file has changed."""
    first, last = wanted.first, wanted.last
    num_rows = last.first_row + last.num_rows - first.first_row
    rows = read(first.uri, first.first_row, num_rows, first.offset, max_prompt_bytes)
    good = (row for _, _, row in rows if isinstance(row, Row))
    keys = dict(zip(wanted.positions.tolist(), wanted.keys, strict=True))
    found = {position: row for position, row in enumerate(good, first.start) if position in keys}
    if len(found) < len(keys) or any(key_of(row) != keys[position].tobytes() for position, row in found.items()):
        raise changed(first.uri)
    return {position: row.prompt_id for position, row in found.items()}


def changed(uri: str) -> UserError:
    return UserError(f"{uri}: holds other rows than when the job began: it must not change under a job")
