"""URIs to filesystems: the one place that knows where bytes live.

A URI is a local path, `file://...` or `s3://bucket/key`. S3 takes its endpoint, region and credentials from the usual
AWS variables and configuration files, so any S3-compatible store works. Every write is whole or absent.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from prefill_router.errors import UserError

_S3_CONFIG = {
    "retries": {"mode": "standard", "max_attempts": 10},
    "connect_timeout": 10,
    "read_timeout": 60,
    # Stores other than Amazon's reject the newer default checksums.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


@cache
def _local() -> LocalFileSystem:
    return LocalFileSystem()


@cache
def _s3() -> Any:
    # Listings change under us (other writers), so none is cached.
    return fsspec.filesystem("s3", config_kwargs=_S3_CONFIG, use_listings_cache=False, skip_instance_cache=True)


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI and the path inside it. Raises UserError for a scheme that is not supported."""
    scheme, separator, rest = uri.partition("://")
    if not uri:
        raise UserError("an empty path was given")
    if not separator:
        return _local(), str(Path(uri).expanduser().absolute())
    if scheme == "file":
        return _local(), str(Path(rest).absolute())
    if scheme == "s3":
        if not rest.strip("/"):
            raise UserError(f"{uri}: names no bucket")
        return _s3(), rest.rstrip("/")
    raise UserError(f'{uri}: scheme "{scheme}" is not supported: use a local path, file:// or s3://')


def absolute(uri: str) -> str:
    """A local path as an absolute one, for a process in another folder; any other URI as it is."""
    return uri if "://" in uri or not uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/") or "/", *names])


def name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def exists(uri: str) -> bool:
    fs, path = resolve(uri)
    return bool(fs.exists(path))


def is_file(uri: str) -> bool:
    fs, path = resolve(uri)
    return bool(fs.isfile(path))


def size_bytes(uri: str) -> int:
    fs, path = resolve(uri)
    return int(fs.size(path))


def require(uri: str, what: str) -> None:
    """Raises UserError unless something lies at `uri`."""
    if not exists(uri):
        raise UserError(f"{uri}: no such {what}")


def list_files(uri: str, suffixes: Sequence[str]) -> list[str]:
    """The file at `uri`, or the files directly below it with one of `suffixes`, sorted, as URIs."""
    fs, path = resolve(uri)
    if fs.isfile(path):
        return [uri]
    names = sorted(entry["name"].rpartition("/")[2] for entry in fs.ls(path, detail=True) if entry["type"] == "file")
    return [join(uri, n) for n in names if n.lower().endswith(tuple(suffixes)) and not n.startswith((".", "_"))]


def open_input(uri: str) -> IO[bytes]:
    """A seekable binary stream."""
    fs, path = resolve(uri)
    return cast(IO[bytes], fs.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    fs, path = resolve(uri)
    return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the object whole: a reader sees the old one or the new one, never a part."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not JSON: {error}") from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def open_parquet(uri: str) -> pq.ParquetFile:
    """Raises UserError where the file is no Parquet."""
    fs, path = resolve(uri)
    source = path if isinstance(fs, LocalFileSystem) else fs.open(path, "rb", cache_type="none")
    try:
        return pq.ParquetFile(source, pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri}: not a Parquet file: {error}") from None


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, reading only `columns`."""
    with open_parquet(uri) as file:
        return file.read(columns=None if columns is None else list(columns))


def encode_parquet(table: pa.Table) -> bytes:
    """A table as the bytes of one Parquet file."""
    sink = io.BytesIO()
    # Dictionaries never pay for activations, and cost a pass over them.
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


def arrow_location(uri: str) -> tuple[pafs.FileSystem | None, str]:
    """The Arrow filesystem of a URI, None for the local one, and the path inside it."""
    fs, path = resolve(uri)
    return (None if isinstance(fs, LocalFileSystem) else pafs.PyFileSystem(pafs.FSSpecHandler(fs))), path


def remove(uri: str) -> None:
    """Deletes a file or a whole folder; nothing happens where there is none."""
    fs, path = resolve(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
