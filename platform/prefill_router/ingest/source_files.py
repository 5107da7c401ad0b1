"""Finds the files of a source: a single file, or all files of a format below a folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.ingest.records import Format
from prefill_router.storage.compression import unpacked

PACKAGE = "package:"
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt")


class Source(NamedTuple):
    """URIs of the files to read, in order, and of the other, unexpected files in the folder."""

    files: list[str]
    others: list[str]


def find_source(uri: str, kind: Format) -> Source:
    """Finds the files of format `kind` at `uri`. Raises UserError if there are none."""
    storage.require(uri, "source")
    found = storage.find_files(uri)
    if found == [uri]:
        _refuse_pickle(uri)
        if not _has_suffix(uri, kind):
            raise UserError(f"{uri}: unexpected file type: format {kind.name} reads {', '.join(kind.suffixes)}")
        return Source(found, [])
    found = [file for file in found if not kind.is_companion(storage.name(file))]
    files = [file for file in found if _has_suffix(file, kind) and kind.is_wanted(storage.name(file))]
    if not files:
        for file in found:
            _refuse_pickle(file)
        raise UserError(f"{uri}: no files of format {kind.name} found: looked for {', '.join(kind.suffixes)}")
    taken = set(files)
    return Source(sorted(files, reverse=kind.newest_first), [file for file in found if file not in taken])


def located(source: str) -> str:
    """The URI of a source. `package:NAME/FOLDER` is a folder of an installed package, which is not imported.

    Raises UserError if the package is not installed.
    """
    if not source.startswith(PACKAGE):
        return source
    name, _, folder = source.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UserError(f"{source}: no Python package {name} is installed: install it, or give a file or folder")
    return str(Path(spec.origin).parent / folder)


def _has_suffix(uri: str, kind: Format) -> bool:
    return unpacked(uri).endswith(kind.suffixes)


def _refuse_pickle(uri: str) -> None:
    if uri.lower().endswith(_PICKLES):
        raise UserError(
            f"{uri}: pickle files are not read, since loading one can run code: if you trust it, export it with "
            'pandas.read_pickle(path).to_parquet("table.parquet")'
        )
