"""The commit log of an extraction: one record for each shard that is done, which is then never computed again.

Shards are named by their content, and neither their files nor their records are ever overwritten. So a restart redoes
nothing, a larger corpus or more layers cost only what is new, and two writers cannot harm each other. A worker commits
a shard by creating a small file, a loose record. The driver gathers loose records into segments; a crash leaves each
record in one of the two, or in both, where it counts once. Readers of activations use the manifest, which is written
at the end; only `store_keys` reads the keys of rows from the log.
"""

# n rows of a shard

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ValidationError

from prefill_router import storage
from prefill_router.activations import activation_store, commit_records, commit_segments
from prefill_router.activations.commit_records import Commit
from prefill_router.activations.commit_segments import Segment
from prefill_router.common import validation
from prefill_router.common.errors import UserError
from prefill_router.corpus.row_keys import RowKeys
from prefill_router.encoder.encoder_spec import EncoderIdentity
from prefill_router.storage import parquet_objects

SEGMENT_RECORDS = 4096  # number of loose records that are gathered into one segment

_COMMITS = "commits"
_SEGMENTS = "segments"
_ENCODER = "encoder.json"
_SEGMENTS_AHEAD = 8  # segments whose keys are read concurrently: 25 MB each if shards have 256 rows
_ATTEMPTS = 5  # to open a log while a writer gathers its records


class StoreConflictError(UserError):
    """A store holds activations of another encoder, or of prompts that the corpus lacks."""


@dataclass(frozen=True, slots=True)
class RecordLocation:
    """Where a record was found."""

    name: str
    segment: str | None  # the digest of its segment, None for a loose record


class CommitLog:
    """The records of an output: those present when the log was opened, and those added since.

    Each record has a fixed position: records in segments come first, then loose records. A million records take about
    0.3 GB of memory. Their keys are only read on request.
    """

    def __init__(
        self,
        uri: str,
        encoder: EncoderIdentity | None,
        segments: list[Segment],
        loose: list[Commit],
        obsolete: Sequence[str],
    ) -> None:
        self.uri, self.encoder = uri, encoder
        self._segments, self._loose = segments, loose
        self._obsolete = list(obsolete)  # names of loose records that a segment also holds

    @classmethod
    def open(cls, uri: str) -> CommitLog:
        """Opens the log of the output at `uri`, which may be empty."""
        path = storage.join(uri, _ENCODER)
        encoder = validation.validate(EncoderIdentity, storage.read_json(path), path) if storage.exists(path) else None
        for _ in range(_ATTEMPTS - 1):
            try:
                return cls(uri, encoder, *_read_all(uri))
            except FileNotFoundError:  # a listed record was gathered meanwhile
                continue
        return cls(uri, encoder, *_read_all(uri))

    def __len__(self) -> int:
        return sum(len(segment.records) for segment in self._segments) + len(self._loose)

    @property
    def records(self) -> pa.Table:
        """One row per record, by position, with the columns `commit_segments.LISTED`."""
        loose = commit_records.to_table(self._loose).select(commit_segments.LISTED)
        return pa.concat_tables([*(segment.records for segment in self._segments), loose])

    @property
    def column_sets(self) -> list[list[str]]:
        """The distinct sets of activation columns of the shards."""
        chunks = (chunk.unique().to_pylist() for chunk in self.records["columns"].chunks)
        return [text.split(",") for text in dict.fromkeys(itertools.chain.from_iterable(chunks))]

    def positions(self, values: pa.Array | Sequence[str], column: str = "name") -> NDArray[np.int64]:
        """The position of the record with each value in a unique column; -1 if there is none."""
        found = pc.index_in(pa.array(values, pa.string()), value_set=self.records[column].combine_chunks())
        return np.asarray(found.fill_null(-1), np.int64)

    def places(self, positions: NDArray[np.int64]) -> list[RecordLocation]:
        """The locations of the records at `positions`."""
        names = self.records["name"].take(positions).to_pylist()
        digests = [*(segment.digest for segment in self._segments), None]
        indices = np.searchsorted(self._ends, positions, side="right").tolist()
        return [RecordLocation(name, digests[index]) for name, index in zip(names, indices, strict=True)]

    def keys(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, RowKeys]]:
        """Yields positions in ascending order, each with the record's keys (n, 3).

        Reads the keys of a segment at once, and several segments concurrently.
        """
        positions = np.sort(positions)
        parts = np.split(positions, np.searchsorted(positions, self._ends))
        indices = [index for index, part in enumerate(parts) if len(part)]
        for index, keys in zip(indices, storage.read_ahead(self._keys_at, indices, _SEGMENTS_AHEAD), strict=True):
            start = self._start(index)
            for position in parts[index].tolist():
                yield position, keys[position - start]

    def _keys_at(self, index: int) -> list[RowKeys]:
        """The keys of each record of segment `index`, or of the loose records if `index` follows the last segment."""
        if index < len(self._segments):
            return self._segments[index].read_keys()
        return [record.row_keys for record in self._loose]

    def add(self, record: Commit) -> None:
        """Adds a loose record, and gathers if there are `SEGMENT_RECORDS`."""
        self._loose.append(record)
        if len(self._loose) >= SEGMENT_RECORDS:
            self.gather()

    def gather(self) -> None:
        """Moves the loose records into segments."""
        while self._loose:
            part = self._loose[:SEGMENT_RECORDS]
            keys = [record.row_keys for record in part]
            self._segments.append(commit_segments.write(_segments_path(self.uri), commit_records.to_table(part), keys))
            self._obsolete += [record.name for record in part]
            del self._loose[:SEGMENT_RECORDS]
        storage.remove_many([_commit_path(self.uri, name) for name in self._obsolete])
        self._obsolete = []

    def tidy(self, keep: Sequence[str]) -> None:
        """Deletes all records but those named in `keep`, and the files of all other shards.

        Gathers loose records if there are many, as an earlier version left them. Keeps segments that another writer
        added after this log was opened.
        """
        is_kept = np.zeros(len(self), np.bool_)
        positions = self.positions(keep)
        is_kept[positions[positions >= 0]] = True
        files = self.records["file"].filter(is_kept).drop_null().to_pylist()
        parts = np.split(is_kept, self._ends)
        kept = [segment.keep(part) for segment, part in zip(self._segments, parts[:-1], strict=True)]
        before = {segment.digest for segment in self._segments}
        self._segments = [segment for segment in kept if segment is not None]
        commit_segments.remove(_segments_path(self.uri), before - {segment.digest for segment in self._segments})
        self._loose = [record for record, stays in zip(self._loose, parts[-1], strict=True) if stays]
        names = set(_loose_names(self.uri)) - {record.name for record in self._loose}
        storage.remove_many([_commit_path(self.uri, name) for name in sorted(names)])
        parquet_objects.remove_shards(self.uri, keep=set(files))
        if len(self._loose) >= SEGMENT_RECORDS:
            self.gather()

    @property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(segment.records) for segment in self._segments], dtype=np.int64)

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) if index else 0


def _read_all(uri: str) -> tuple[list[Segment], list[Commit], list[str]]:
    """Returns the segments, the loose records, and the names of loose records that a segment also holds."""
    names = _loose_names(uri)  # listed first, so that a record that is gathered meanwhile is found in a segment
    segments = commit_segments.read_all(_segments_path(uri))
    in_segments = pa.concat_tables([commit_segments.NONE, *(segment.records for segment in segments)])["name"]
    is_obsolete = pc.is_in(pa.array(names, pa.string()), value_set=in_segments.combine_chunks()).to_pylist()
    paths = [_commit_path(uri, name) for name, is_in in zip(names, is_obsolete, strict=True) if not is_in]
    loose = [_parse(data, path) for data, path in zip(storage.read_many(paths), paths, strict=True)]
    return segments, loose, [name for name, is_in in zip(names, is_obsolete, strict=True) if is_in]


def _parse(data: bytes, path: str) -> Commit:
    try:
        return Commit.model_validate_json(data)
    except ValidationError:
        raise UserError(f"{path}: is not a valid shard record: remove it, and the shard is computed again") from None


def find(uri: str, name: str) -> Commit | None:
    """The loose record of one shard, or None. Segments need not be searched: the driver does not assign their shards.

    A second driver that does not know a segment commits its shards again; their files are left unchanged.
    """
    path = _commit_path(uri, name)
    try:
        return _parse(storage.read_bytes(path), path)
    except FileNotFoundError:
        return None


def read(uri: str, place: RecordLocation) -> Commit:
    """Reads the record at a location, or from a segment if it was gathered meanwhile."""
    if place.segment is None and (record := find(uri, place.name)):
        return record
    folder = _segments_path(uri)
    for digest in [place.segment] if place.segment else commit_segments.list_digests(folder):
        if record := commit_segments.read(folder, digest).find(place.name):
            return record
    raise UserError(f"{uri}: the record of shard {place.name} is missing: run extract again")


def commit(uri: str, record: Commit) -> Commit:
    """Commits a shard whose file is written. If another worker was faster, its record is kept and returned."""
    path = _commit_path(uri, record.name)
    if storage.create_bytes(path, record.model_dump_json().encode()):
        return record
    return find(uri, record.name) or record  # it is not found if it was gathered


def claim_encoder(uri: str, identity: EncoderIdentity) -> None:
    """Reserves the output for one encoder. Raises StoreConflictError if it holds activations of another one."""
    path = storage.join(uri, _ENCODER)
    if storage.create_bytes(path, identity.model_dump_json().encode()):
        return
    stored = validation.validate(EncoderIdentity, storage.read_json(path), path)
    if stored.fingerprint != identity.fingerprint:
        raise StoreConflictError(
            f"{uri}: holds activations of another encoder ({stored.spec.model}, or the same with other weights, "
            "tokenizer, dtype or settings): choose another folder, or replace it with extract --overwrite"
        )


def clear(uri: str) -> None:
    """Deletes an extraction, starting with its manifest; leaves other files."""
    activation_store.remove_manifest(uri)
    storage.remove(storage.join(uri, _COMMITS))
    storage.remove(storage.join(uri, _ENCODER))
    parquet_objects.remove_shards(uri)


def _loose_names(uri: str) -> list[str]:
    names = storage.list_names(storage.join(uri, _COMMITS))
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _commit_path(uri: str, name: str) -> str:
    return storage.join(uri, _COMMITS, f"{name}.json")


def _segments_path(uri: str) -> str:
    return storage.join(uri, _COMMITS, _SEGMENTS)
