"""URIs to filesystems: the one place that knows where bytes live.

A URI is a local path, `file://...` or `s3://bucket/key`. S3 takes its endpoint, region and credentials from the usual
AWS variables and configuration files, so any S3-compatible store works. Every write is whole or absent.
"""

from __future__ import annotations

import errno
import io
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
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import AfterValidator, Field

from prefill_router.common.errors import UserError, one_line

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_READERS = 32
_ANEW = "write it anew"  # the remedy for a damaged file
_GROUP_BYTES, _PIECE_BYTES = 256 << 20, 8 << 20  # of a Parquet file: above, it is fetched in such pieces
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # how file systems without hard links say so


@cache
def _local() -> LocalFileSystem:
    return LocalFileSystem()


@cache
def _s3() -> Any:
    from prefill_router.storage import s3  # which takes a while to import, and many never need

    return s3.connect()


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
        if "?versionId=" in rest:  # which s3fs would cut off
            raise UserError(f"{uri}: names a version of an object: only the latest can be read")
        return _s3(), rest.rstrip("/")
    raise UserError(f'{uri}: scheme "{scheme}" is not supported: use a local path, file:// or s3://')


def absolute(uri: str) -> str:
    """A local path as an absolute one, for a process in another folder; any other URI as it is."""
    return uri if "://" in uri or not uri else str(Path(uri).expanduser().absolute())


# An option that is a URI. Workers run in folders of their own: a relative path is made absolute where it is given.
Uri = Annotated[str, Field(min_length=1), AfterValidator(absolute)]


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/") or "/", *names])


def name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def exists(uri: str) -> bool:
    fs, path = resolve(uri)
    return bool(fs.exists(path))


def is_file(uri: str) -> bool:
    return _is_file(*resolve(uri))


def _is_file(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    # `fs.isfile` would take a failure for a no.
    if isinstance(fs, LocalFileSystem):
        return Path(path).is_file()
    try:
        return bool(fs.info(path)["type"] == "file")
    except FileNotFoundError:
        return False


def check_output(uri: str) -> None:
    """Raises UserError where nothing could be written below `uri`, which is asked before anything that takes long.

    A local folder is only looked at; to a bucket, an empty object is written and deleted.
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
    """The sizes of many files, asked for concurrently."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(size_bytes, uris))


def require(uri: str, what: str) -> None:
    """Raises UserError unless something lies at `uri`."""
    if not exists(uri):
        raise UserError(f"{uri}: no such {what}")


def list_files(uri: str, suffixes: Sequence[str]) -> list[str]:
    """The file at `uri`, or the files directly below it with one of `suffixes`, sorted, as URIs."""
    fs, path = resolve(uri)
    if _is_file(fs, path):
        return [uri]
    names = sorted(entry["name"].rpartition("/")[2] for entry in fs.ls(path, detail=True) if entry["type"] == "file")
    return [join(uri, n) for n in names if n.lower().endswith(tuple(suffixes)) and not n.startswith((".", "_"))]


def find(uri: str) -> tuple[list[str], list[str]]:
    """The file at `uri`, or all files at any depth below it, and what is neither; sorted, as URIs.

    Hidden ones are left out. Links are followed, but not into a folder that they lie in. Raises UserError where `uri`
    itself is neither.
    """
    fs, path = resolve(uri)
    if _is_file(fs, path):
        return [uri], []
    is_local = isinstance(fs, LocalFileSystem)
    if is_local and not Path(path).is_dir() and Path(path).exists():
        raise UserError(f"{uri}: is a pipe or a device, which is read but once: write it to a file")
    files: list[str] = []
    others: list[str] = []
    for place, is_file in _walk(path) if is_local else ((place, True) for place in fs.find(path)):
        below = place.removeprefix(f"{path.rstrip('/')}/")
        if not any(part.startswith(".") for part in below.split("/")):
            (files if is_file else others).append(join(uri, below))
    return sorted(files), sorted(others)


def find_files(uri: str) -> list[str]:
    """The files that `find` finds."""
    return find(uri)[0]


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """What lies in a local folder at any depth and is none itself, and whether it is a file."""
    above = (*above, str(Path(folder).resolve()))
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.path, entry.is_file()
            elif not entry.is_symlink() or str(Path(entry.path).resolve()) not in above:
                yield from _walk(entry.path, above)


def list_names(uri: str) -> list[str]:
    """The names directly below a folder, of files and folders, sorted; none where there is no folder.

    Names that begin with a dot are left out: drafts of writers that died may lie there.
    """
    fs, path = resolve(uri)
    try:
        paths = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    names = (p.removeprefix(f"{path}/").rstrip("/") for p in paths if p.startswith(f"{path}/"))
    return sorted(n for n in names if n and not n.startswith("."))


def stamp(uri: str) -> str:
    """Changes whenever the object at `uri` does: of a local file its size and time, of one in S3 its ETag."""
    fs, path = resolve(uri)
    info = fs.info(path)
    return f"{info['size']}:{info.get('ETag') or info['mtime']}"


def open_input(uri: str) -> IO[bytes]:
    """A seekable binary stream."""
    fs, path = resolve(uri)
    return cast(IO[bytes], fs.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    fs, path = resolve(uri)
    return bytes(fs.cat_file(path))


def read_range(uri: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of an object."""
    fs, path = resolve(uri)
    return bytes(fs.cat_file(path, start=start, end=end)) if start < end else b""


def read_many(uris: Sequence[str]) -> list[bytes]:
    """The objects at `uris`, in that order, read concurrently: over a network, small ones are mostly waited for."""
    places = [resolve(uri) for uri in uris]
    with ThreadPoolExecutor(_READERS) as pool:
        return [bytes(data) for data in pool.map(lambda place: place[0].cat_file(place[1]), places)]


def read_ahead(
    read: Callable[[_Item], _Result], items: Iterable[_Item], num_ahead: int = _READERS
) -> Iterator[_Result]:
    """What `read` returns for each item, in order, computed concurrently: at most `num_ahead` results are held."""
    with ThreadPoolExecutor(num_ahead) as pool:
        begun: deque[Future[_Result]] = deque()
        for item in items:
            begun.append(pool.submit(read, item))
            if len(begun) == num_ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the object whole: a reader sees the old one or the new one, never a part."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.write(path, data)
        return
    target = Path(path)
    with _draft(target, data) as draft:
        draft.replace(target)


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes the object whole unless something lies there, and says whether it did: of racing creators, one does.

    Whoever must know whose object it is reads it. On S3, False may stand for one's own object: where the answer to an
    attempt is lost, the next one finds what the first has created.
    """
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return bool(fs.create(path, data))
    with _draft(Path(path), data) as draft:
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise UserError(
                f"{uri}: this file system has no hard links, which keep two writers apart: choose another place"
            ) from error
    return True


@contextmanager
def _draft(target: Path, data: bytes) -> Iterator[Path]:
    """A file beside `target` that holds `data`, on the disk. What is made of it there is on the disk afterwards too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(uri: str) -> Any:
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


def open_parquet(uri: str) -> pq.ParquetFile:
    """A file whose row groups are fetched one at a time, and larger ones piece by piece: read them under `damage`.

    Raises UserError where the file is no Parquet.
    """
    fs, path = resolve(uri)
    source = path if isinstance(fs, LocalFileSystem) else fs.open(path, "rb", cache_type="none")
    with damage(uri):
        try:
            file = pq.ParquetFile(source, pre_buffer=True)
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            if max(map(_stored_bytes, groups), default=0) > _GROUP_BYTES:
                file = pq.ParquetFile(source, buffer_size=_PIECE_BYTES, pre_buffer=False, metadata=file.metadata)
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: not a Parquet file: {one_line(error)}: {_ANEW}") from None
    return file


@contextmanager
def damage(uri: str, remedy: str = _ANEW) -> Iterator[None]:
    """Raises UserError where Arrow cannot read what lies at `uri`; the storage's own failures are passed on."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if is_failure_of_storage(error):
            raise
        raise UserError(f"{uri}: is damaged, or of a kind that is not read: {one_line(error)}: {remedy}") from None


def is_failure_of_storage(error: BaseException) -> bool:
    """Or is it the data that is bad? Then gzip and Arrow raise an OSError as well, but one without a number, and bytes
    that lead before the beginning of a file one that says that the argument is invalid."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _stored_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def read_table(uri: str, columns: Sequence[str] | None = None, remedy: str = _ANEW) -> pa.Table:
    """One Parquet file, reading only `columns`. Raises UserError, with a remedy, where it is damaged."""
    with damage(uri, remedy), open_parquet(uri) as file:
        return file.read(columns=None if columns is None else list(columns))


def encode_parquet(table: pa.Table, dictionaries: Sequence[str] = ()) -> bytes:
    """A table as the bytes of one Parquet file, the columns `dictionaries` as such."""
    sink = io.BytesIO()
    # Dictionaries never pay for activations, and cost a pass over them.
    pq.write_table(table, sink, compression="zstd", use_dictionary=list(dictionaries))
    return sink.getvalue()


def arrow_location(uri: str) -> tuple[pafs.FileSystem | None, str]:
    """The Arrow filesystem of a URI, None for the local one, and the path inside it."""
    fs, path = resolve(uri)
    return (None if isinstance(fs, LocalFileSystem) else pafs.PyFileSystem(pafs.FSSpecHandler(fs))), path


def remove(uri: str) -> None:
    """Deletes a file or a whole folder; nothing happens where there is none."""
    fs, path = resolve(uri)
    with suppress(FileNotFoundError):  # or another was faster
        if _is_file(fs, path):
            fs.rm_file(path)
        elif isinstance(fs, LocalFileSystem):
            # fsspec's asks for the working directory, which Ray's raylets of one machine may have put anew.
            shutil.rmtree(path)
        else:
            fs.remove_below(path)


def remove_many(uris: Sequence[str]) -> None:
    """Deletes files that lie at one place, S3's by the thousand; those that are gone are passed over."""
    places = [resolve(uri) for uri in uris]
    if not places:
        return
    fs = places[0][0]
    if not isinstance(fs, LocalFileSystem):
        fs.remove_many([path for _, path in places])
        return
    for _, path in places:
        Path(path).unlink(missing_ok=True)
