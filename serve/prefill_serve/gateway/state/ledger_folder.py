"""The ledger's folder: a journal of calls, outcomes from feedback, and prompts, as JSON lines and Parquet files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefill_router import storage
from prefill_router.common.schema import (
    AT,
    CALL_ID,
    CALLER,
    CORRECT,
    COST_USD,
    FEEDBACK,
    FIRST_TOKEN_S,
    LATENCY_S,
    MESSAGES,
    OUTPUT_TOKENS,
    PROMPT,
    PROMPT_ID,
    PROPENSITY,
    REQUEST_ID,
    TARGET,
)
from prefill_serve.gateway.call_record import CallRecord
from prefill_serve.gateway.state.call_memory import MOST_CALLS, RecentNames
from prefill_serve.gateway.state.feedback import StoredFeedback
from prefill_serve.gateway.state.row_files import RowFolder

log = logging.getLogger("ray.serve")

_MOST_REPEATED = 1_000_000  # calls between the two copies that an interrupted merge leaves

Row = dict[str, Any]


class LedgerFolder:
    """The ledger's folder, with subfolders journal, outcomes and prompts."""

    def __init__(self, uri: str) -> None:
        self.journal = RowFolder(storage.join(uri, "journal"), ".jsonl", _encode_calls, _decode_calls)
        self.outcomes = RowFolder(storage.join(uri, "outcomes"), ".parquet", _encode_outcomes, _decode_outcomes)
        self.prompts = RowFolder(storage.join(uri, "prompts"), ".parquet", _encode_prompts, _decode_prompts)
        self._stored_prompts = RecentNames()  # an evicted id may be stored twice, which is harmless

    def read_calls(self, since: datetime) -> Iterator[CallRecord]:
        """Removes calls from before a time, and yields the others, oldest first, each once."""
        self.journal.forget(since)
        self._stored_prompts.update(self.prompts.read(_decode_prompt_ids))
        seen = RecentNames(_MOST_REPEATED)
        for record in self.journal.read():
            if record.at >= since and record.call_id not in seen:
                seen.update([record.call_id])
                yield record

    def read_outcomes(self, calls: Mapping[str, CallRecord]) -> tuple[list[Row], Counter[str]]:
        """Returns the latest outcomes, and the number of outcomes by caller. `calls` tell the callers of older rows."""
        outcomes: dict[str, Row] = {}
        num_outcomes: Counter[str] = Counter()
        for row in self.outcomes.read():
            if row[CALLER] is None:
                row[CALLER] = calls[row[CALL_ID]].caller if row[CALL_ID] in calls else ""
            num_outcomes[row[CALLER]] += row[CALL_ID] not in outcomes
            outcomes[row[CALL_ID]] = row
            if len(outcomes) > MOST_CALLS:
                del outcomes[next(iter(outcomes))]
        return list(outcomes.values()), num_outcomes

    def write_calls(self, calls: Sequence[CallRecord], now: datetime, since: datetime) -> None:
        """Writes calls to the journal, and removes files of before `since` from it."""
        self.journal.write(calls, now)
        self.journal.forget(since)
        _merge(self.journal, now)

    def write_outcomes(self, batch: Sequence[tuple[StoredFeedback, CallRecord]], now: datetime) -> None:
        prompts = {record.prompt_id: record.prompt for _, record in batch if record.prompt is not None}
        new = {key: prompt for key, prompt in prompts.items() if key not in self._stored_prompts}
        if new:  # before the outcomes, so that none lacks its prompt
            self.prompts.write([{PROMPT_ID: key, PROMPT: prompt} for key, prompt in new.items()], now)
            self._stored_prompts.update(new)
            _merge(self.prompts, now)
        self.outcomes.write([_outcome(given, record) for given, record in batch], now)
        _merge(self.outcomes, now)


def _merge(segments: RowFolder[Any], now: datetime) -> None:
    """Merges small files; a failure loses nothing."""
    try:
        segments.merge(now)
    except Exception:
        log.exception("small files not merged", extra={"folder": segments.uri})


def _outcome(given: StoredFeedback, record: CallRecord) -> Row:
    return {
        PROMPT_ID: record.prompt_id,
        TARGET: record.target,
        CORRECT: given.value,
        OUTPUT_TOKENS: given.output_tokens,
        COST_USD: record.reported_usd,
        PROPENSITY: record.propensity,
        REQUEST_ID: record.request_id,
        AT: record.at,
        CALLER: record.caller,
        CALL_ID: record.call_id,
        FIRST_TOKEN_S: record.first_token_s,
        LATENCY_S: record.answer_s,
    }


def _encode_calls(calls: Sequence[CallRecord]) -> bytes:
    return "".join(f"{record.to_json()}\n" for record in calls).encode()


def _decode_calls(data: bytes) -> Iterator[CallRecord]:
    return (CallRecord.from_json(line) for line in data.splitlines())


def _encode_outcomes(rows: Sequence[Row]) -> bytes:
    unique = {row[CALL_ID]: row for row in rows}
    return storage.encode_parquet(pa.Table.from_pylist(list(unique.values()), schema=FEEDBACK))


def _decode_outcomes(data: bytes) -> list[Row]:
    """Older files lack caller and call id, and have each request id once."""
    return [{CALLER: None, CALL_ID: row[REQUEST_ID], **row} for row in _decode_table(data)]


def _encode_prompts(rows: Sequence[Row]) -> bytes:
    text = [row[PROMPT] if isinstance(row[PROMPT], str) else None for row in rows]
    messages = [row[PROMPT] if not isinstance(row[PROMPT], str) else None for row in rows]
    table = pa.table(
        {
            PROMPT_ID: pa.array([row[PROMPT_ID] for row in rows], pa.string()),
            PROMPT: pa.array(text, pa.string()),
            MESSAGES: pa.array(messages, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        }
    )
    return storage.encode_parquet(table)


def _decode_table(data: bytes) -> list[Row]:
    rows: list[Row] = pq.read_table(BytesIO(data)).to_pylist()
    return rows


def _decode_prompt_ids(data: bytes) -> list[str | None]:
    ids: list[str | None] = pq.read_table(BytesIO(data), columns=[PROMPT_ID])[PROMPT_ID].to_pylist()
    return ids


def _decode_prompts(data: bytes) -> list[Row]:
    return [{PROMPT_ID: row[PROMPT_ID], PROMPT: row[PROMPT] or row[MESSAGES]} for row in _decode_table(data)]
