"""A corpus of prompts: Parquet, JSONL or CSV files, validated once and cut into deterministic shards.

A shard is a run of rows in one file. The same corpus always gives the same shards, so an actor that is handed one can
write a deterministic object, and any of them can be done again alone.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np

from prefill_router import storage
from prefill_router.errors import UserError
from prefill_router.schema import MESSAGES, PROMPT, PROMPT_ID

SUFFIXES = (".parquet", ".jsonl", ".csv")

Message = dict[str, str]
Prompt = str | list[Message]  # a bare prompt, or the messages of a conversation


class Row(NamedTuple):
    """One prompt of a corpus; `id_is_hash` where the corpus gave no prompt_id."""

    prompt_id: str
    prompt: Prompt
    id_is_hash: bool


@dataclass(frozen=True)
class Shard:
    """Rows [first_row, first_row + num_rows) of one file; `offset` is where they begin in bytes (text formats)."""

    index: int
    uri: str
    first_row: int
    num_rows: int
    offset: int


@dataclass(frozen=True)
class CorpusPlan:
    """The shards of a corpus, and what the scan saw."""

    shards: list[Shard]
    num_rows: int
    num_repeated: int  # rows without prompt_id whose content stood in an earlier row: they share its id


def plan(uri: str, shard_rows: int, limit: int | None = None) -> CorpusPlan:
    """Reads the corpus through once, validating every row, and cuts it into shards of `shard_rows`.

    Memory: 8 bytes a row. Raises UserError for a missing or empty corpus, a prompt that is null, empty or no string,
    and a prompt_id that stands twice.
    """
    storage.require(uri, "corpus")
    shards: list[Shard] = []
    hashes, given = array("Q"), array("b")
    for file in storage.list_files(uri, SUFFIXES):
        rows = read(file, num_rows=None if limit is None else limit - len(hashes))
        while block := list(itertools.islice(rows, shard_rows)):
            first, offset = block[0][0], block[0][1]
            shards.append(Shard(len(shards), file, first, len(block), offset))
            hashes.extend(prompt_hash(row.prompt_id) for _, _, row in block)
            given.extend(not row.id_is_hash for _, _, row in block)
        if limit is not None and len(hashes) >= limit:
            break
    if not hashes:
        raise UserError(f"{uri}: the corpus is empty: it holds no prompt in {', '.join(SUFFIXES)} files")
    return CorpusPlan(shards, len(hashes), _count_repeated(shards, hashes, given))


def read_shard(shard: Shard) -> list[Row]:
    """Raises UserError where the file is not the one that was planned."""
    rows = [row for _, _, row in read(shard.uri, shard.first_row, shard.num_rows, shard.offset)]
    if len(rows) != shard.num_rows:
        raise UserError(f"{shard.uri}: has fewer rows than when the job began: it must not change under a job")
    return rows


def prompt_hash(prompt_id: str) -> int:
    """64 bits that stand for a prompt where ids would take too much room: in splits and in sets of seen prompts."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")


def _count_repeated(shards: list[Shard], hashes: array[int], given: array[int]) -> int:
    """How many rows repeat an earlier row's content. Raises UserError where a given prompt_id stands twice."""
    values, first_seen, counts = np.unique(np.frombuffer(hashes, np.uint64), return_index=True, return_counts=True)
    repeated = values[counts > 1]
    is_repeated = np.isin(np.frombuffer(hashes, np.uint64), repeated)
    clashing = np.flatnonzero(is_repeated & (np.frombuffer(given, np.int8) == 1))
    if clashing.size:
        position = int(clashing[-1])
        for shard in shards:
            if position < shard.num_rows:
                prompt_id = read_shard(shard)[position].prompt_id
                raise UserError(f'{shard.uri}: prompt_id "{prompt_id}" stands more than once; ids must be unique')
            position -= shard.num_rows
    return len(hashes) - len(first_seen)


# --- reading -----------------------------------------------------------------------------------------------------

Record = tuple[int, int, dict[str, Any]]  # row, byte offset, fields


def read(uri: str, first_row: int = 0, num_rows: int | None = None, offset: int = 0) -> Iterator[tuple[int, int, Row]]:
    """Yields (row, offset, Row) of one file from `first_row` on. Raises UserError at the first row that is unfit."""
    suffix = "." + uri.rpartition(".")[2].lower()
    if suffix not in _READERS:
        raise UserError(f"{uri}: a corpus is one of {', '.join(SUFFIXES)}")
    records = _READERS[suffix](uri, first_row, offset)
    for row, position, fields in itertools.islice(records, num_rows):
        yield row, position, _row(fields, f"{uri}: row {row + 1}")


def _read_parquet(uri: str, first_row: int, _offset: int) -> Iterator[Record]:
    with storage.open_parquet(uri) as file:
        columns = [c for c in (PROMPT_ID, PROMPT, MESSAGES) if c in file.schema_arrow.names]
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], dtype=np.int64)
        group = int(np.searchsorted(ends, first_row, side="right"))
        skip = first_row - int(ends[group - 1] if group else 0)
        row = first_row
        for batch in file.iter_batches(batch_size=1024, row_groups=range(group, len(ends)), columns=columns):
            for fields in batch.slice(min(skip, len(batch))).to_pylist():
                yield row, 0, fields
                row += 1
            skip = max(0, skip - len(batch))


class _Lines:
    """The lines of a binary stream, and the offset at which the next one begins."""

    def __init__(self, stream: IO[bytes], uri: str) -> None:
        self.stream, self.uri, self.position = stream, uri, stream.tell()

    def __iter__(self) -> Iterator[str]:
        for line in self.stream:
            start, self.position = self.position, self.position + len(line)
            try:
                yield line.decode("utf-8-sig" if start == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.uri}: byte {start + error.start}: not UTF-8") from None


def _read_jsonl(uri: str, first_row: int, offset: int) -> Iterator[Record]:
    with storage.open_input(uri) as stream:
        stream.seek(offset)
        lines = _Lines(stream, uri)
        row, position = first_row, offset
        for line in lines:
            if line.strip():
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{uri}: row {row + 1}: not JSON: {error}") from None
                if not isinstance(fields, dict):
                    raise UserError(f"{uri}: row {row + 1}: must be a JSON object with prompt or messages")
                yield row, position, fields
                row += 1
            position = lines.position


def _read_csv(uri: str, first_row: int, offset: int) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # prompts may be long
    with storage.open_input(uri) as stream:
        lines = _Lines(stream, uri)
        reader = csv.reader(iter(lines), strict=True)
        try:
            header = next(reader, [])
            if offset:
                stream.seek(offset)
                lines = _Lines(stream, uri)
                reader = csv.reader(iter(lines), strict=True)
            row, position = first_row, lines.position
            for values in reader:
                if values:
                    if len(values) != len(header):
                        raise UserError(
                            f"{uri}: row {row + 1}: has {len(values)} values, but the header names {len(header)}: "
                            "quote a prompt that holds a comma"
                        )
                    yield row, position, {k: v or None for k, v in zip(header, values, strict=True)}
                    row += 1
                position = lines.position
        except csv.Error as error:
            raise UserError(f"{uri}: near byte {lines.position}: not CSV: {error}") from None


_READERS: dict[str, Callable[[str, int, int], Iterator[Record]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def _row(fields: dict[str, Any], where: str) -> Row:
    prompt: Prompt
    if fields.get(MESSAGES) is not None:
        prompt = check_messages(fields[MESSAGES], where)
    elif PROMPT in fields or MESSAGES in fields:
        prompt = _text(fields.get(PROMPT), PROMPT, where)
    else:
        raise UserError(f"{where}: has neither {PROMPT} nor {MESSAGES}")
    if PROMPT_ID in fields:
        return Row(_text(fields[PROMPT_ID], PROMPT_ID, where), prompt, id_is_hash=False)
    return Row(content_hash(prompt), prompt, id_is_hash=True)


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {key} = {_shown(value)}, must be a non-empty string")
    return _encodable(value, key, where)


def _encodable(value: str, key: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} = {_shown(value)}, holds half a character: it is not valid Unicode") from None
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def check_messages(value: object, where: str) -> list[Message]:
    """A conversation as [{"role": ..., "content": ...}]. Raises UserError where it is none."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {MESSAGES} = {_shown(value)}, must be a non-empty list of role and content")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: {MESSAGES}[{i}] = {_shown(message)}, must have role and content")
        _text(message["role"], f"{MESSAGES}[{i}].role", where)
        if not isinstance(message["content"], str):
            raise UserError(f"{where}: {MESSAGES}[{i}].content = {_shown(message['content'])}, must be a string")
        _encodable(message["content"], f"{MESSAGES}[{i}].content", where)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def content_hash(prompt: Prompt) -> str:
    """The id of a prompt that came without one: 128 bits of SHA-256, in hex."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
