"""The record of a committed shard: a JSON file written by the worker that built it, or a row of a table."""

# n rows of a shard

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from prefill_router.common import validation
from prefill_router.common.schema import COMMITS
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.row_keys import RowKeys, as_keys, content_hashes
from prefill_router.storage import parquet_objects

_KEY_CHARACTERS = 32  # of the 24 bytes of a row key in base64


class RejectedPrompt(validation.StrictModel):
    """A row that the encoder failed on, with the digest of its prompt."""

    uri: str
    row: int
    prompt_id: str
    content: str
    reason: str

    def to_bad_row(self) -> BadRow:
        return BadRow(self.uri, self.row, self.prompt_id, self.reason)


class Commit(validation.StrictModel):
    """One committed shard: its file, and the rows in it."""

    name: str
    file: parquet_objects.ShardFile | None  # None if the encoder failed on each row
    columns: list[str]
    num_tokens: int
    truncated: list[int]  # indices of rows in the shard
    keys: str  # base64 of (n, 3) uint64, as returned by `row_keys.row_keys`
    refused: list[RejectedPrompt]

    @model_validator(mode="after")
    def _has_a_key_for_each_row(self) -> Commit:
        if len(self.keys) != _KEY_CHARACTERS * self.rows:
            raise ValueError("keys: must have one key per row")
        return self

    @property
    def rows(self) -> int:
        return 0 if self.file is None else self.file.rows

    @property
    def row_keys(self) -> RowKeys:
        return as_keys(base64.b64decode(self.keys))

    @staticmethod
    def encode_keys(keys: RowKeys) -> str:
        return base64.b64encode(keys.tobytes()).decode()

    @property
    def contents(self) -> list[str]:
        """The digest of each row's prompt, in hexadecimal."""
        return content_hashes(self.row_keys)


def shard_name(digest: str, columns: Iterable[str]) -> str:
    """The name of a shard: a hash of the plan's digest of its rows, and of its columns."""
    return hashlib.sha256("\n".join([digest, *columns]).encode()).hexdigest()[:32]


def to_table(records: Sequence[Commit]) -> pa.Table:
    """Converts records to a table with one row per record, without the keys."""
    return pa.Table.from_pylist([_to_row(record) for record in records], schema=COMMITS)


def _to_row(record: Commit) -> dict[str, object]:
    file = record.file
    return {
        "name": record.name,
        "file": file and file.name,
        "rows": record.rows,
        "bytes": file and file.bytes,
        "sha256": file and file.sha256,
        "num_tokens": record.num_tokens,
        "num_truncated": len(record.truncated),
        "columns": ",".join(record.columns),
        "truncated": record.truncated,
        "refused": [refused.model_dump() for refused in record.refused],
    }


def from_table(table: pa.Table, row: int, keys: RowKeys) -> Commit:
    """The inverse of `to_table` for one row, given its keys."""
    fields = table.slice(row, 1).to_pylist()[0]
    described = {"name": fields["file"], **{key: fields[key] for key in ("rows", "bytes", "sha256")}}
    return Commit(
        name=fields["name"],
        file=None if fields["file"] is None else parquet_objects.ShardFile(**described),
        columns=fields["columns"].split(","),
        num_tokens=fields["num_tokens"],
        truncated=fields["truncated"],
        keys=Commit.encode_keys(keys),
        refused=fields["refused"],
    )


def bad_rows(table: pa.Table) -> Iterator[BadRow]:
    """The rows that the encoder failed on, in the order of the table."""
    column = table["refused"]
    for refused in column.filter(pc.greater(pc.list_value_length(column), 0)).to_pylist():
        yield from (RejectedPrompt(**fields).to_bad_row() for fields in refused)
