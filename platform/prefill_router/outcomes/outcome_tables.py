"""Tables of outcomes, from files in long format: Parquet in batches, and any other format of a corpus row by row."""

# N rows

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefill_router import storage
from prefill_router.common.errors import InvalidRowError, UserError
from prefill_router.common.schema import (
    CALL_ID,
    CORRECT,
    COST_USD,
    LATENCY_S,
    OUTCOMES,
    OUTPUT_TOKENS,
    PROMPT,
    PROMPT_ID,
    PROPENSITY,
    REQUEST_ID,
    TARGET,
)
from prefill_router.corpus.formats import FORMATS, SUFFIXES, read_records
from prefill_router.corpus.grades import RawAnswer, grade
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, BadRow, content_hash, validate_text
from prefill_router.corpus.split import prompt_hashes
from prefill_router.corpus.text_files import Fields

_BATCH_ROWS, _MAX_ROW_BYTES = 1 << 17, 64 * MAX_PROMPT_BYTES
_PARQUET = ".parquet"


def tables(uri: str, invalid: list[BadRow] | None = None) -> Iterator[pa.Table]:
    """Yields graded rows in batches of the schema OUTCOMES. Of repeated rows of a request, only the first counts.

    An invalid row of a text file is added to `invalid` if that is given, and raises UserError otherwise.
    """
    requests: set[int] = set()
    for file in _files(uri):
        yield from _pieces(file, requests, invalid)


def _files(uri: str) -> list[str]:
    """The Parquet files at `uri`, or if there are none, those of other formats."""
    storage.require(uri, "outcomes")
    files = storage.list_files(uri, [_PARQUET]) or storage.list_files(uri, SUFFIXES)
    if not files:
        raise UserError(f"{uri}: has no file of outcomes: pass a file, or a folder of them, in {FORMATS}")
    return files


def _columns(uri: str) -> list[str]:
    """The columns of a file; of JSON, the keys of its first valid row."""
    if uri.endswith(_PARQUET):
        with storage.open_parquet(uri) as file:
            return list(file.schema_arrow.names)
    names: list[str] = []

    def choose(columns: Sequence[str]) -> list[str]:
        names.extend(columns)
        return list(columns)

    for _, _, fields in read_records(uri, choose, 0, 0, _MAX_ROW_BYTES):
        if names or isinstance(fields, dict):
            return names or list(fields)
    return names


def _pieces(uri: str, requests: set[int], invalid: list[BadRow] | None) -> Iterator[pa.Table]:
    if not uri.endswith(_PARQUET):
        _check_names(_columns(uri), uri)
        yield from _from_rows(uri, invalid)
        return
    with storage.damage(uri), storage.open_parquet(uri) as file:
        names = file.schema_arrow.names
        _check_names(names, uri)
        wanted = [name for name in (*OUTCOMES.names, REQUEST_ID, CALL_ID) if name in names]
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted if PROMPT_ID in names else [*wanted, PROMPT]):
            table = pa.Table.from_batches([batch])
            yield _normalised(_first_of_requests(table, requests) if REQUEST_ID in names else table, uri)


def _from_rows(uri: str, invalid: list[BadRow] | None) -> Iterator[pa.Table]:
    records = read_records(uri, list, 0, 0, _MAX_ROW_BYTES)
    while block := list(itertools.islice(records, _BATCH_ROWS)):
        rows = []
        for row, _, fields in block:
            try:
                rows.append(_outcome(fields))
            except InvalidRowError as error:
                bad = BadRow(uri, row, None, str(error))
                if invalid is None:
                    raise UserError(bad.message) from None
                invalid.append(bad)
        yield pa.Table.from_pylist([row for row in rows if row[CORRECT] is not None], schema=OUTCOMES)


def _outcome(fields: Fields | str) -> dict[str, Any]:
    """A row of text as one of OUTCOMES. Raises InvalidRowError for an invalid value."""
    if isinstance(fields, str):
        raise InvalidRowError(fields)
    answer = grade(RawAnswer(*(fields.get(name) for name in (TARGET, CORRECT, OUTPUT_TOKENS, COST_USD))))
    prompt_id = fields.get(PROMPT_ID)
    if prompt_id is None:
        prompt_id = content_hash(validate_text(fields.get(PROMPT), PROMPT, MAX_PROMPT_BYTES))
    return dict(zip(OUTCOMES.names, (str(prompt_id), *answer), strict=True))


def _first_of_requests(table: pa.Table, requests: set[int]) -> pa.Table:
    """Keeps the first row of each request that is not in `requests` (hashes), and adds it there.

    Requests are identified by `call_id` if the table has it, because two callers may use the same request id.
    """
    ids = table[REQUEST_ID]
    if CALL_ID in table.column_names:
        ids = pc.coalesce(table[CALL_ID], ids)
    is_new = np.zeros(len(table), bool)
    for i, request in enumerate(prompt_hashes(ids.to_pylist()).tolist()):
        is_new[i] = request not in requests
        requests.add(request)
    return table.filter(pa.array(is_new))


def _normalised(table: pa.Table, uri: str) -> pa.Table:
    if PROMPT_ID not in table.column_names:
        table = table.append_column(PROMPT_ID, _content_hashes(table[PROMPT]))
    for name in (OUTPUT_TOKENS, COST_USD):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), OUTCOMES.field(name).type))
    columns = []
    for field in OUTCOMES:
        try:
            columns.append(table[field.name].cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{uri}: column {field.name} must be {field.type}: {error}") from None
    table = pa.table(columns, names=OUTCOMES.names)
    for key in (PROMPT_ID, TARGET):
        if table[key].null_count:
            raise UserError(f"{uri}: {table[key].null_count} rows have no {key}")
    # An ungraded answer is a missing outcome.
    return table.filter(pc.is_valid(table[CORRECT]))


def _content_hashes(prompts: pa.ChunkedArray) -> pa.Array:
    """The ids of prompts without one; null where the prompt is."""
    encoded = pc.dictionary_encode(prompts.cast(pa.string()).combine_chunks())
    return pa.array([content_hash(prompt) for prompt in encoded.dictionary.to_pylist()], pa.string()).take(
        encoded.indices
    )


def check_columns(uri: str) -> None:
    """Raises UserError if outcomes, or columns of them, are missing. Reads at most one row of a file."""
    for file in _files(uri):
        _check_names(_columns(file), file)


def _check_names(names: Sequence[str], uri: str) -> None:
    for required in (PROMPT_ID, TARGET, CORRECT):
        if required not in names and not (required == PROMPT_ID and PROMPT in names):
            raise UserError(
                f"{uri}: column {required} is missing; it has {', '.join(names)[:200] or 'none'}. "
                "A table with a column for each model is read by prefill-router quickstart, or converted by ingest"
            )


def is_feedback(uri: str) -> bool:
    """Returns whether these outcomes are a gateway's feedback, in which a pair may occur in many requests."""
    (first, *_) = _files(uri)
    return first.endswith(_PARQUET) and REQUEST_ID in _columns(first)


def load_feedback(uri: str, more: Sequence[str] = ()) -> pa.Table:
    """Reads the graded requests of a gateway's feedback, one row each.

    Columns are prompt_id, target, correct, propensity, request_id and `more`, and call_id and latency_s, which are null
    in older files.

    Raises UserError if a column of feedback is missing.
    """
    requests: set[int] = set()
    wanted = list(dict.fromkeys([PROMPT_ID, TARGET, CORRECT, PROPENSITY, REQUEST_ID, *more]))
    tables = []
    for file in _files(uri):
        with storage.damage(file), storage.open_parquet(file) as parquet:
            names = parquet.schema_arrow.names
            if missing := [name for name in wanted if name not in names]:
                raise UserError(f"{file}: column {missing[0]} is missing: not a gateway's feedback")
            table = _first_of_requests(parquet.read([*wanted, *({CALL_ID, LATENCY_S} & set(names))]), requests)
        for name, kind in ((CALL_ID, pa.string()), (LATENCY_S, pa.float32())):
            if name not in names:  # an older file
                table = table.append_column(name, pa.nulls(len(table), kind))
        tables.append(table.select([*wanted, CALL_ID, LATENCY_S]).filter(pc.is_valid(table[CORRECT])))
    return pa.concat_tables(tables)


def target_names(uri: str) -> list[str]:
    """Returns the names of all targets with outcomes at `uri`, sorted."""
    return sorted({name for table in tables(uri) for name in pc.unique(table[TARGET]).to_pylist()})
