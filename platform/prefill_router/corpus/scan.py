"""Scans a corpus once: collects each file's runs of rows and the keys of valid rows; looks up ids later if needed."""

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
from prefill_router.corpus.row_keys import KEY_BYTES, RowKeys, as_keys, content_hashes, have_own_hash, key_of

T = TypeVar("T")
R = TypeVar("R")

# Where runs grow: the row up to which each length is used. Ends of usual shards, so that the next ones are the usual.
_SHORT_RUNS = ((256, 16), (1024, 64))

_MIN_GROUPS, _MAX_GROUP_FILES, _NUM_READERS = 64, 64, 8  # groups of files that one call scans, with so many threads

Positions = NDArray[np.int64]  # indices of rows among all valid rows of the corpus


class Spread(Protocol):
    """Applies a function to many items: `map` itself, or a version with the same results on a cluster."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


class Run(NamedTuple):
    """Consecutive rows of one file; `start` is the position of its first valid row."""

    uri: str
    first_row: int
    num_rows: int
    offset: int  # the byte where the rows begin (text formats)
    bad: tuple[int, ...]  # counted from first_row
    start: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows - len(self.bad)

    def good_rows(self) -> NDArray[np.int64]:
        """The row number of each position, counted from first_row."""
        return np.delete(np.arange(self.num_rows), np.array(self.bad, np.int64))


@dataclass
class FileScan:
    """The result of scanning one file, or several consecutive ones; positions count from 0."""

    runs: list[Run]
    keys: bytearray
    bad: list[BadRow]

    def extend(self, other: FileScan) -> None:
        """Appends the scan of the files that follow."""
        start = len(self.keys) // KEY_BYTES
        self.runs.extend(run._replace(start=start + run.start) for run in other.runs)
        self.keys += other.keys
        self.bad.extend(other.bad)


@dataclass(frozen=True)
class Scan:
    """The result of scanning a corpus: all runs, the keys of all valid rows, and the invalid rows."""

    runs: list[Run]
    keys: RowKeys
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
        """The id of each row. Reads the files of the rows again, unless the ids are hashes."""
        keys = self.keys[positions]
        ids = dict(zip(positions.tolist(), content_hashes(keys), strict=True))
        given = np.sort(positions[~have_own_hash(keys)])
        runs = [self.runs[i] for i in np.unique(self.runs_of(given))]
        requests = []
        for _, of_file in itertools.groupby(runs, key=lambda run: run.uri):
            span = list(of_file)
            in_file = given[(given >= span[0].start) & (given < span[-1].end)]
            requests.append(_IdRequest(span[0], span[-1], in_file, self.keys[in_file]))
        for found in spread(partial(_read_ids, max_prompt_bytes=self.max_prompt_bytes), requests):
            ids.update(found)
        return list(ids.values())


def scan_files(
    uris: Sequence[str],
    shard_rows: int,
    limit: int | None,
    max_prompt_bytes: int,
    spread: Spread,
    *,
    grow: bool = False,
) -> Scan:
    """Reads the first `limit` rows of some files once, in runs of `shard_rows`, or that grow in the first file."""
    growing = next(iter(uris), None) if grow else None
    scan_one = partial(scan_file, shard_rows=shard_rows, max_prompt_bytes=max_prompt_bytes, growing=growing)
    if limit is None:
        size = max(1, min(_MAX_GROUP_FILES, len(uris) // _MIN_GROUPS))
        parts = spread(partial(_scan_group, scan_one), [uris[i : i + size] for i in range(0, len(uris), size)])
    else:
        parts = _scan_up_to(limit, scan_one, uris)
    whole = _merged(parts)
    return Scan(whole.runs, as_keys(whole.keys), whole.bad, max_prompt_bytes)


def _scan_group(scan_one: Callable[[str], FileScan], uris: Sequence[str]) -> FileScan:
    """Scans files concurrently, since reading many small ones is mostly latency."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return _merged(pool.map(scan_one, uris))


def _merged(parts: Iterator[FileScan]) -> FileScan:
    whole = next(parts, FileScan([], bytearray(), []))  # extended in place: a copy would double the memory
    for part in parts:
        whole.extend(part)
    return whole


def _scan_up_to(limit: int, scan_one: Callable[..., FileScan], uris: Sequence[str]) -> Iterator[FileScan]:
    """Scans one file after another until `limit` rows are read."""
    for uri in uris:
        part = scan_one(uri, limit=limit)
        yield part
        limit -= sum(run.num_rows for run in part.runs)
        if not limit:
            return


def scan_file(
    uri: str, shard_rows: int, max_prompt_bytes: int, limit: int | None = None, growing: str | None = None
) -> FileScan:
    """Scans the first `limit` rows of one file; its runs grow if it is the file `growing`."""
    found = FileScan([], bytearray(), [])
    rows = read(uri, num_rows=limit, max_prompt_bytes=max_prompt_bytes)
    num_rows = 0
    while block := list(itertools.islice(rows, _run_rows(num_rows, shard_rows) if uri == growing else shard_rows)):
        num_rows += len(block)
        first_row, offset, _ = block[0]
        start, invalid = len(found.keys) // KEY_BYTES, []
        for i, (_, _, row) in enumerate(block):
            if isinstance(row, Row):
                found.keys += key_of(row)
            else:
                invalid.append(i)
                found.bad.append(row)
        found.runs.append(Run(uri, first_row, len(block), offset, tuple(invalid), start))
    return found


def _run_rows(first_row: int, shard_rows: int) -> int:
    """The rows of the run that begins at a row, if runs grow."""
    return next((min(rows, shard_rows) for end, rows in _SHORT_RUNS if first_row < end), shard_rows)


class _IdRequest(NamedTuple):
    """Rows of one file whose ids are requested; they are in its runs `first` to `last`."""

    first: Run
    last: Run
    positions: Positions
    keys: RowKeys


def _read_ids(request: _IdRequest, max_prompt_bytes: int) -> dict[int, str]:
    """Returns the ids by position. Raises UserError if the file has changed."""
    first, last = request.first, request.last
    num_rows = last.first_row + last.num_rows - first.first_row
    rows = read(first.uri, first.first_row, num_rows, first.offset, max_prompt_bytes)
    good = (row for _, _, row in rows if isinstance(row, Row))
    keys = dict(zip(request.positions.tolist(), request.keys, strict=True))
    found = {position: row for position, row in enumerate(good, first.start) if position in keys}
    if len(found) < len(keys) or any(key_of(row) != keys[position].tobytes() for position, row in found.items()):
        raise changed(first.uri)
    return {position: row.prompt_id for position, row in found.items()}


def changed(uri: str) -> UserError:
    return UserError(f"{uri}: changed while the job was running: run it again on files that do not change")
