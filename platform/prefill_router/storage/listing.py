"""Lists what is stored at and below a URI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from prefill_router.common.errors import UserError
from prefill_router.storage import uris


def list_files(uri: str, suffixes: Sequence[str]) -> list[str]:
    """The file at `uri`, or the visible files directly below it with one of `suffixes`, as sorted URIs."""
    fs, path = uris.resolve(uri)
    if uris.is_file(uri):
        return [uri]
    names = sorted(entry["name"].rpartition("/")[2] for entry in fs.ls(path, detail=True) if entry["type"] == "file")
    return [uris.join(uri, n) for n in names if n.lower().endswith(tuple(suffixes)) and not n.startswith((".", "_"))]


def find(uri: str) -> tuple[list[str], list[str]]:
    """Returns the files at or below `uri`, at any depth, and the other entries such as pipes; both as sorted URIs.

    Skips hidden entries. Follows links, except into a folder that contains them. Raises UserError if `uri` itself is
    neither a file nor a folder.
    """
    fs, path = uris.resolve(uri)
    if uris.is_file(uri):
        return [uri], []
    is_local = isinstance(fs, LocalFileSystem)
    if is_local and not Path(path).is_dir() and Path(path).exists():
        raise UserError(f"{uri}: is a pipe or a device, which can be read only once: copy it to a file")
    files: list[str] = []
    others: list[str] = []
    for found, is_file in _walk(path) if is_local else ((found, True) for found in fs.find(path)):
        below = found.removeprefix(f"{path.rstrip('/')}/")
        if not any(part.startswith(".") for part in below.split("/")):
            (files if is_file else others).append(uris.join(uri, below))
    return sorted(files), sorted(others)


def find_files(uri: str) -> list[str]:
    """The files at or below `uri`: see `find`."""
    return find(uri)[0]


def list_names(uri: str) -> list[str]:
    """The sorted names of the files and folders directly below a folder; empty if it does not exist.

    Skips names that begin with a dot, such as temporary files of killed writers.
    """
    fs, path = uris.resolve(uri)
    try:
        paths = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    names = (p.removeprefix(f"{path}/").rstrip("/") for p in paths if p.startswith(f"{path}/"))
    return sorted(n for n in names if n and not n.startswith("."))


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """Yields each entry at any depth that is not a folder, and whether it is a file."""
    above = (*above, str(Path(folder).resolve()))
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.path, entry.is_file()
            elif not entry.is_symlink() or str(Path(entry.path).resolve()) not in above:
                yield from _walk(entry.path, above)
