"""Stores rows in immutable files, and merges many small files into one.

If the process dies between writing the merged file and removing the small ones, rows are duplicated: readers
deduplicate by id.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar, overload

from prefill_router import storage

Row = TypeVar("Row")
Part = TypeVar("Part")
_READ_FILES = 16
_TIME = "%Y%m%dT%H%M%S%f"  # names of older files lack the fraction, and sort before those of their second
MOST_FILES = 64
SMALL_BYTES = 4 << 20


class RowFolder(Generic[Row]):
    """A folder of files named by their time of writing, with a single writer, which lists them once."""

    def __init__(
        self,
        uri: str,
        suffix: str,
        encode: Callable[[Sequence[Row]], bytes],
        decode: Callable[[bytes], Iterable[Row]],
    ) -> None:
        self.uri, self.suffix = uri, suffix
        self._encode, self._decode = encode, decode
        self._sizes: dict[str, int] | None = None  # in bytes, by name; None until the files are listed

    def write(self, rows: Sequence[Row], at: datetime) -> None:
        """Writes rows as a new file; they are durable when this returns."""
        name = f"{at.strftime(_TIME)}-{uuid.uuid4().hex[:12]}{self.suffix}"
        data, sizes = self._encode(rows), self._listed()
        storage.write_bytes(storage.join(self.uri, name), data)
        sizes[name] = len(data)

    @overload
    def read(self) -> Iterator[Row]: ...
    @overload
    def read(self, decode: Callable[[bytes], Iterable[Part]]) -> Iterator[Part]: ...
    def read(self, decode: Callable[[bytes], Iterable[Any]] | None = None) -> Iterator[Any]:
        """Yields all rows, or the output of `decode`, oldest file first. Holds a few files in memory at a time."""
        uris = [storage.join(self.uri, name) for name in self._names()]
        for start in range(0, len(uris), _READ_FILES):
            for data in storage.read_many(uris[start : start + _READ_FILES]):
                yield from (decode or self._decode)(data)

    def merge(self, at: datetime) -> None:
        """Merges small files into one, if there are at least MOST_FILES of them."""
        small = sorted(name for name, size in self._listed().items() if size < SMALL_BYTES)
        if len(small) < MOST_FILES:
            return
        try:
            files = storage.read_many([storage.join(self.uri, name) for name in small])
            self.write([row for data in files for row in self._decode(data)], at)
        except FileNotFoundError:  # somebody else removed one
            self._sizes = None
            raise
        self._remove(small)

    def forget(self, before: datetime) -> None:
        """Removes files written before a time."""
        self._remove([name for name in self._listed() if name < before.strftime(_TIME)])

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            storage.remove(storage.join(self.uri, name))
            self._listed().pop(name, None)

    def _listed(self) -> dict[str, int]:
        if self._sizes is None:
            self._sizes = {name: storage.size_bytes(storage.join(self.uri, name)) for name in self._names()}
        return self._sizes

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.uri) if name.endswith(self.suffix)]
