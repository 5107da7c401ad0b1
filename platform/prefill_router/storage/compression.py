"""Opens files that may be compressed (.gz, .zst, .bz2), and text files that may be UTF-16 or UTF-32."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import pyarrow as pa

from prefill_router import storage
from prefill_router.common.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2")
_BUFFER_BYTES = 1 << 20
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def unpacked(uri: str) -> str:
    """The name of the decompressed file, in lower case: a.jsonl for a.JSONL.gz."""
    name = uri.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


@contextmanager
def open_bytes(uri: str) -> Iterator[io.BufferedReader]:
    """Opens a file's decompressed bytes as a stream that can seek forward. Raises UserError if they are damaged."""
    with storage.open_input(uri) as raw:
        try:
            yield io.BufferedReader(cast(io.RawIOBase, _decompressed(uri, raw)), _BUFFER_BYTES)
        except (EOFError, zlib.error, OSError) as error:
            if storage.is_failure_of_storage(error):
                raise
            raise UserError(f"{uri}: cannot be decompressed: {error}: write it again") from None


@contextmanager
def open_text(uri: str) -> Iterator[io.BufferedReader]:
    """Like `open_bytes`, but re-encodes text as UTF-8 if it begins with the mark of UTF-16 or UTF-32."""
    with open_bytes(uri) as stream:
        encoding = next((name for mark, name in _MARKS.items() if stream.peek(4).startswith(mark)), None)
        if encoding is None:
            yield stream
            return
        try:
            yield io.BufferedReader(cast(io.RawIOBase, _Forward(_Recoded(stream, encoding))), _BUFFER_BYTES)
        except UnicodeDecodeError as error:
            raise UserError(f"{uri}: starts as {encoding}, but is not {encoding}: {error.reason}") from None


def _decompressed(uri: str, raw: IO[bytes]) -> object:
    if uri.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if uri.lower().endswith(".bz2"):
        return bz2.BZ2File(raw)
    if uri.lower().endswith(".zst"):
        return _Forward(pa.CompressedInputStream(raw, "zstd"))
    return raw


class _Recoded:
    """A stream that re-encodes text as UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()
        self._recoded = b""

    def read(self, size: int) -> bytes:
        while not self._recoded and (data := self._stream.read(_BUFFER_BYTES)):
            self._recoded = self._decoder.decode(data).encode()
        if not self._recoded:
            self._decoder.decode(b"", final=True)
        read, self._recoded = self._recoded[:size], self._recoded[size:]
        return read


class _Forward(io.RawIOBase):
    """Gives a stream that cannot seek a position, and seeks forward by reading."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._position = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        if whence == io.SEEK_END or offset < self._position:
            raise io.UnsupportedOperation("a compressed stream can only seek forward")
        while self._position < offset and (data := self._stream.read(min(offset - self._position, _BUFFER_BYTES))):
            self._position += len(data)
        return self._position
