"""The files of a source: one file, or all of a format that lie anywhere below a folder."""

from __future__ import annotations

from typing import NamedTuple

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.ingest.records import Format
from prefill_router.storage.compression import unpacked

_PICKLES = (".pkl", ".pickle", ".joblib", ".pt")


class Source(NamedTuple):
    """URIs of the files to read, in their order, and of those in the folder that nobody expects there."""

    files: list[str]
    others: list[str]


def find_source(uri: str, kind: Format) -> Source:
    """Raises UserError where nothing at `uri` is of the format `kind`."""
    storage.require(uri, "source")
    found = storage.find_files(uri)
    if found == [uri]:
        _refuse_pickle(uri)
        if not _has_suffix(uri, kind):
            raise UserError(f"{uri}: a file of {kind.name} is one of {', '.join(kind.suffixes)}")
        return Source(found, [])
    found = [file for file in found if not kind.is_companion(storage.name(file))]
    files = [file for file in found if _has_suffix(file, kind) and kind.is_wanted(storage.name(file))]
    if not files:
        for file in found:
            _refuse_pickle(file)
        raise UserError(f"{uri}: holds no file of {kind.name}: looked for {', '.join(kind.suffixes)}")
    taken = set(files)
    return Source(sorted(files, reverse=kind.newest_first), [file for file in found if file not in taken])


def _has_suffix(uri: str, kind: Format) -> bool:
    return unpacked(uri).endswith(kind.suffixes)


def _refuse_pickle(uri: str) -> None:
    if uri.lower().endswith(_PICKLES):
        raise UserError(
            f"{uri}: a pickle runs code as it is loaded, and is not read: where you trust it, export it with "
            'pandas.read_pickle(path).to_parquet("table.parquet")'
        )
