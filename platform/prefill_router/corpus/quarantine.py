"""The quarantine of a job: the invalid rows that its output lacks, each with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from prefill_router import storage
from prefill_router.common.schema import QUARANTINE
from prefill_router.corpus.reader import BadRow
from prefill_router.storage.parquet_objects import ShardFile, write_named

_QUARANTINE = "quarantine/rows.parquet"


def write_quarantine(uri: str, bad: Sequence[BadRow]) -> ShardFile | None:
    """Writes the invalid rows; if there are none, removes the quarantine of an earlier run."""
    if not bad:
        storage.remove(storage.join(uri, _QUARANTINE))
        return None
    columns = zip(*((row.uri, row.row, row.prompt_id, row.reason) for row in bad), strict=True)
    return write_named(uri, _QUARANTINE, pa.table([list(c) for c in columns], schema=QUARANTINE))


def read_quarantine(uri: str) -> list[BadRow]:
    """Reads the rows that `write_quarantine` wrote; empty if there is no quarantine."""
    path = storage.join(uri, _QUARANTINE)
    if not storage.exists(path):
        return []
    return [BadRow(*row.values()) for row in storage.read_table(path).to_pylist()]
