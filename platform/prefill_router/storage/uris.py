"""Reads, writes and deletes objects by URI: a local path, `file://...` or `s3://bucket/key`.

S3 takes its endpoint, region and credentials from the usual AWS variables and configuration files, so any
S3-compatible store works. Every write is atomic.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import shutil
import tomllib
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar, cast

import fsspec
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem
from pydantic import AfterValidator, Field

from prefill_router.common.errors import UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_NUM_READERS = 32
_MISSPELT = 0.8  # difflib ratio of a missing file's name to one beside it
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of file systems that have none


@cache
def _local() -> LocalFileSystem:
    return LocalFileSystem()


@cache
def _s3() -> Any:
    from prefill_router.storage import s3  # slow to import, and often not needed

    return s3.connect()


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the filesystem of a URI and the path inside it. Raises UserError if the scheme is not supported."""
    scheme, separator, rest = uri.partition("://")
    if not uri:
        raise UserError("empty path: give a local path, file:// or s3://")
    if not separator:
        return _local(), str(Path(uri).expanduser().absolute())
    if scheme == "file":
        return _local(), str(Path(rest).absolute())
    if scheme == "s3":
        if not rest.strip("/"):
            raise UserError(f"{uri}: names no bucket: use s3://bucket/key")
        if "?versionId=" in rest:  # s3fs would cut it off
            raise UserError(f"{uri}: names a version of an object, but only the latest can be read: omit ?versionId")
        return _s3(), rest.rstrip("/")
    raise UserError(f'{uri}: scheme "{scheme}" is not supported: use a local path, file:// or s3://')


def absolute(uri: str) -> str:
    """Makes a local path absolute, for a process in another folder; returns any other URI unchanged."""
    return uri if "://" in uri or not uri else str(Path(uri).expanduser().absolute())


# The type of an option that is a URI. Workers run in folders of their own, so a relative path is made absolute at once.
Uri = Annotated[str, Field(min_length=1), AfterValidator(absolute)]


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/") or "/", *names])


def name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def exists(uri: str) -> bool:
    fs, path = resolve(uri)
    return bool(fs.exists(path))


def is_file(uri: str) -> bool:
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return Path(path).is_file()
    try:
        return bool(fs.info(path)["type"] == "file")  # `fs.isfile` returns False if the request fails
    except FileNotFoundError:
        return False


def check_output(uri: str) -> None:
    """Raises UserError if nothing can be written below `uri`; call it before long work.

    Checks the permissions of a local folder; in a bucket, writes and deletes an empty object.
    """
    if is_file(uri):
        raise UserError(f"{uri}: is a file: an output is a folder, choose another --out")
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        probe = join(uri, f".{uuid.uuid4().hex}")
        try:
            write_bytes(probe, b"")
            remove(probe)
        except OSError as error:
            raise UserError(f"{uri}: cannot be written: {error}: choose another --out") from error
        return
    folder = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "is not writable" if folder.is_dir() else "is a file"
        raise UserError(f"{uri}: cannot be written: {folder} {what}: choose another --out")


def size_bytes(uri: str) -> int:
    fs, path = resolve(uri)
    return int(fs.size(path))


def sizes_bytes(uris: Sequence[str]) -> list[int]:
    """The sizes of many files, queried concurrently."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(size_bytes, uris))


def require(uri: str, what: str) -> None:
    """Raises UserError if no file or folder exists at `uri`; `what` names it in the message.

    The message names a local file or folder beside it whose name is close.
    """
    if exists(uri):
        return
    fs, path = resolve(uri)
    folder, close = Path(path).parent, list[str]()
    if isinstance(fs, LocalFileSystem) and folder.is_dir():
        close = difflib.get_close_matches(name(path), [file.name for file in folder.iterdir()], 1, _MISSPELT)
    hint = f', did you mean "{close[0]}"?' if close else ""
    raise UserError(f"{uri}: no such {what}{hint}")


def stamp(uri: str) -> str:
    """A string that changes whenever the object at `uri` does: size and time of a local file, size and ETag in S3."""
    fs, path = resolve(uri)
    info = fs.info(path)
    return f"{info['size']}:{info.get('ETag') or info['mtime']}"


def open_input(uri: str) -> IO[bytes]:
    """Opens an object as a seekable binary stream."""
    fs, path = resolve(uri)
    return cast(IO[bytes], fs.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    fs, path = resolve(uri)
    return bytes(fs.cat_file(path))


def read_range(uri: str, start: int, end: int) -> bytes:
    """Reads the bytes [start, end) of an object."""
    fs, path = resolve(uri)
    return bytes(fs.cat_file(path, start=start, end=end)) if start < end else b""


def read_many(uris: Sequence[str]) -> list[bytes]:
    """Reads the objects at `uris` concurrently and returns them in that order."""
    resolved = [resolve(uri) for uri in uris]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return [bytes(data) for data in pool.map(lambda place: place[0].cat_file(place[1]), resolved)]


def read_ahead(
    read: Callable[[_Item], _Result], items: Iterable[_Item], num_ahead: int = _NUM_READERS
) -> Iterator[_Result]:
    """Calls `read` on the items concurrently and yields the results in order; keeps at most `num_ahead` of them."""
    with ThreadPoolExecutor(num_ahead) as pool:
        pending: deque[Future[_Result]] = deque()
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) == num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_bytes(uri: str, data: bytes) -> None:
    """Writes an object atomically: a reader sees the old one or the new one, never a part."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.write(path, data)
        return
    target = Path(path)
    with _temporary_file(target, data) as temporary:
        temporary.replace(target)


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes an object atomically unless it exists, and returns whether it did. Of racing callers, one creates it.

    On S3, False may mean the caller's own object: if the response to an attempt is lost, the retry finds the object
    that the attempt created. A caller that must know reads the object.
    """
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return bool(fs.create(path, data))
    with _temporary_file(Path(path), data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise UserError(
                f"{uri}: this file system has no hard links, which keep two writers apart: choose another file system"
            ) from error
    return True


@contextmanager
def _temporary_file(target: Path, data: bytes) -> Iterator[Path]:
    """Writes `data` to a temporary file beside `target`, synced to disk; syncs the folder after the `with` block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(uri: str) -> Any:
    """Raises UserError if the file is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not JSON: {error}") from None


def read_toml(uri: str) -> dict[str, Any]:
    """Raises UserError if the file is missing or not TOML."""
    require(uri, "file")
    try:
        return tomllib.loads(read_bytes(uri).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{uri}: not TOML: {error}") from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def is_failure_of_storage(error: BaseException) -> bool:
    """Whether the storage failed, and not the data.

    For bad data, gzip and Arrow raise an OSError without a number, or EINVAL if an offset is negative.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def arrow_location(uri: str) -> tuple[pafs.FileSystem | None, str]:
    """Returns the Arrow filesystem of a URI, None for the local one, and the path inside it."""
    fs, path = resolve(uri)
    return (None if isinstance(fs, LocalFileSystem) else pafs.PyFileSystem(pafs.FSSpecHandler(fs))), path


def remove(uri: str) -> None:
    """Deletes a file or a whole folder, if it exists."""
    fs, path = resolve(uri)
    with suppress(FileNotFoundError):  # another process may delete it too
        if is_file(uri):
            fs.rm_file(path)
        elif isinstance(fs, LocalFileSystem):
            # fsspec's version needs the working directory, which another raylet on this machine may have replaced.
            shutil.rmtree(path)
        else:
            fs.remove_below(path)


def remove_many(uris: Sequence[str]) -> None:
    """Deletes files of one filesystem, if they exist; in S3, a thousand per request."""
    resolved = [resolve(uri) for uri in uris]
    if not resolved:
        return
    fs, paths = resolved[0][0], [path for _, path in resolved]
    if not isinstance(fs, LocalFileSystem):
        fs.remove_many(paths)
        return
    for path in paths:
        Path(path).unlink(missing_ok=True)
