"""The ledger of an extraction: a record for each shard that is done. What it names is never computed again.

Shards are named by what they hold, and both objects and records are only ever created where there is none. So a
restart redoes nothing, a corpus that grew or layers that were added cost what is new, and two writers cannot harm each
other. An actor enters a shard as a small object of its own, and the driver gathers these in segments: whatever kills
it, a record lies in one or the other, or in both, where it is one record. Readers of activations trust the manifest
alone, which is written when all is done; of its shards, `store_keys` takes the rows' keys from here.
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
from prefill_router.corpus.row_keys import Keys
from prefill_router.encoder.prefill_encoder import EncoderIdentity
from prefill_router.storage import parquet_objects

SEGMENT_RECORDS = 4096  # that lie alone before they are gathered

_COMMITS = "commits"
_SEGMENTS = "segments"
_ENCODER = "encoder.json"
_SEGMENTS_AHEAD = 8  # whose keys are read at a time: 25 MB each, where shards have 256 rows
_ATTEMPTS = 5  # to open a ledger that a writer gathers meanwhile


@dataclass(frozen=True, slots=True)
class RecordLocation:
    """Where a record lay when it was looked for: in a segment, or alone."""

    name: str
    segment: str | None


class CommitLog:
    """The records at an output, as they were when it was opened, and what was added since.

    A record has a position, which it keeps: those in segments come first, then those that lie alone. A million take
    about 0.3 GB, without the keys, which stay where they are until they are asked for.
    """

    def __init__(
        self,
        uri: str,
        encoder: EncoderIdentity | None,
        gathered: list[Segment],
        alone: list[Commit],
        left: Sequence[str] = (),
    ) -> None:
        self.uri, self.encoder = uri, encoder
        self._segments, self._alone = gathered, alone
        self._left = list(left)  # names of records that lie alone though a segment holds them

    @classmethod
    def open(cls, uri: str) -> CommitLog:
        path = storage.join(uri, _ENCODER)
        encoder = validation.validate(EncoderIdentity, storage.read_json(path), path) if storage.exists(path) else None
        for _ in range(_ATTEMPTS - 1):
            try:
                return cls(uri, encoder, *_read_all(uri))
            except FileNotFoundError:  # what was listed has been gathered since
                continue
        return cls(uri, encoder, *_read_all(uri))

    def __len__(self) -> int:
        return sum(len(segment.records) for segment in self._segments) + len(self._alone)

    @property
    def records(self) -> pa.Table:
        """A row a record, by position, of the columns `segments.LISTED`."""
        alone = commit_records.to_table(self._alone).select(commit_segments.LISTED)
        return pa.concat_tables([*(segment.records for segment in self._segments), alone])

    @property
    def column_sets(self) -> list[list[str]]:
        """The different columns that shards have."""
        chunks = (chunk.unique().to_pylist() for chunk in self.records["columns"].chunks)
        return [text.split(",") for text in dict.fromkeys(itertools.chain.from_iterable(chunks))]

    def positions(self, values: pa.Array | Sequence[str], column: str = "name") -> NDArray[np.int64]:
        """The position of the record with each name, or another value that stands once; -1 where there is none."""
        found = pc.index_in(pa.array(values, pa.string()), value_set=self.records[column].combine_chunks())
        return np.asarray(found.fill_null(-1), np.int64)

    def places(self, positions: NDArray[np.int64]) -> list[RecordLocation]:
        names = self.records["name"].take(positions).to_pylist()
        digests = [*(segment.digest for segment in self._segments), None]
        of_segments = np.searchsorted(self._ends, positions, side="right").tolist()
        return [RecordLocation(name, digests[index]) for name, index in zip(names, of_segments, strict=True)]

    def keys(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, Keys]]:
        """Some records' positions, in ascending order, with their keys (n, 3).

        A segment's are read together, those of some segments concurrently.
        """
        positions = np.sort(positions)
        parts = np.split(positions, np.searchsorted(positions, self._ends))
        wanted = [index for index, part in enumerate(parts) if len(part)]
        for index, held in zip(wanted, storage.read_ahead(self._keys_at, wanted, _SEGMENTS_AHEAD), strict=True):
            start = self._start(index)
            for position in parts[index].tolist():
                yield position, held[position - start]

    def _keys_at(self, index: int) -> list[Keys]:
        """The keys of each record of a segment, or of those that lie alone, which come after the last."""
        if index < len(self._segments):
            return self._segments[index].read_keys()
        return [record.row_keys for record in self._alone]

    def add(self, record: Commit) -> None:
        """Takes a record that lies alone, and gathers where there are many."""
        self._alone.append(record)
        if len(self._alone) >= SEGMENT_RECORDS:
            self.gather()

    def gather(self) -> None:
        """Moves the records that lie alone into segments."""
        while self._alone:
            part = self._alone[:SEGMENT_RECORDS]
            keys = [record.row_keys for record in part]
            self._segments.append(commit_segments.write(_segments_path(self.uri), commit_records.to_table(part), keys))
            self._left += [record.name for record in part]
            del self._alone[:SEGMENT_RECORDS]
        storage.remove_many([_commit_path(self.uri, name) for name in self._left])
        self._left = []

    def tidy(self, keep: Sequence[str]) -> None:
        """Removes the records and objects that a finished store does not need: its readers do not know of them.

        Where many records lie alone, as those of an earlier version do, they are gathered.
        Segments that came since the ledger was opened are another writer's, and stay.
        """
        stays = np.zeros(len(self), np.bool_)
        positions = self.positions(keep)
        stays[positions[positions >= 0]] = True
        files = self.records["file"].filter(stays).drop_null().to_pylist()
        parts = np.split(stays, self._ends)
        kept = [segment.keep(part) for segment, part in zip(self._segments, parts[:-1], strict=True)]
        before = {segment.digest for segment in self._segments}
        self._segments = [segment for segment in kept if segment is not None]
        commit_segments.remove(_segments_path(self.uri), before - {segment.digest for segment in self._segments})
        self._alone = [record for record, stay in zip(self._alone, parts[-1], strict=True) if stay]
        names = set(_names_alone(self.uri)) - {record.name for record in self._alone}
        storage.remove_many([_commit_path(self.uri, name) for name in sorted(names)])
        parquet_objects.remove_shards(self.uri, keep=set(files))
        if len(self._alone) >= SEGMENT_RECORDS:
            self.gather()

    @property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(segment.records) for segment in self._segments], dtype=np.int64)

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) if index else 0


def _read_all(uri: str) -> tuple[list[Segment], list[Commit], list[str]]:
    """The segments, the records that lie alone, and the names of those that do so though a segment holds them."""
    names = _names_alone(uri)  # first, so that what is gathered meanwhile is found in a segment
    gathered = commit_segments.read_all(_segments_path(uri))
    held = pa.concat_tables([commit_segments.NONE, *(segment.records for segment in gathered)])["name"]
    is_held = pc.is_in(pa.array(names, pa.string()), value_set=held.combine_chunks()).to_pylist()
    paths = [_commit_path(uri, name) for name, is_in in zip(names, is_held, strict=True) if not is_in]
    alone = [_parse(data, path) for data, path in zip(storage.read_many(paths), paths, strict=True)]
    return gathered, alone, [name for name, is_in in zip(names, is_held, strict=True) if is_in]


def _parse(data: bytes, path: str) -> Commit:
    try:
        return Commit.model_validate_json(data)
    except ValidationError:
        raise UserError(f"{path}: is no record of a shard: remove it, and that shard is computed again") from None


def find(uri: str, name: str) -> Commit | None:
    """The record of one shard, where it lies alone. What lies in a segment the driver knows, and hands to nobody.

    A second writer, who does not know that segment, finds the object, leaves it as it is, and enters it once more.
    """
    path = _commit_path(uri, name)
    try:
        return _parse(storage.read_bytes(path), path)
    except FileNotFoundError:
        return None


def read(uri: str, place: RecordLocation) -> Commit:
    """The record at a place, or in a segment where it was gathered since."""
    if place.segment is None and (record := find(uri, place.name)):
        return record
    folder = _segments_path(uri)
    for digest in [place.segment] if place.segment else commit_segments.list_digests(folder):
        if record := commit_segments.read(folder, digest).find(place.name):
            return record
    raise UserError(f"{uri}: the record of shard {place.name} is gone: start extract again")


def commit(uri: str, record: Commit) -> Commit:
    """Enters a shard whose object lies whole. Where another was faster, its record stands and is returned."""
    path = _commit_path(uri, record.name)
    if storage.create_bytes(path, record.model_dump_json().encode()):
        return record
    return find(uri, record.name) or record  # it is gone where it has been gathered


def claim_encoder(uri: str, identity: EncoderIdentity) -> None:
    """Makes the output that of one encoder. Raises UserError where it is another's."""
    path = storage.join(uri, _ENCODER)
    if storage.create_bytes(path, identity.model_dump_json().encode()):
        return
    stored = validation.validate(EncoderIdentity, storage.read_json(path), path)
    if stored.fingerprint != identity.fingerprint:
        raise UserError(
            f"{uri}: holds activations of another encoder ({stored.spec.model}, or the same with other weights, "
            "tokenizer, dtype or settings): choose another folder, or replace it with extract --overwrite"
        )


def clear(uri: str) -> None:
    """Deletes an extraction, its manifest first, and nothing that is not ours."""
    activation_store.remove_manifest(uri)
    storage.remove(storage.join(uri, _COMMITS))
    storage.remove(storage.join(uri, _ENCODER))
    parquet_objects.remove_shards(uri)


def _names_alone(uri: str) -> list[str]:
    names = storage.list_names(storage.join(uri, _COMMITS))
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _commit_path(uri: str, name: str) -> str:
    return storage.join(uri, _COMMITS, f"{name}.json")


def _segments_path(uri: str) -> str:
    return storage.join(uri, _COMMITS, _SEGMENTS)
