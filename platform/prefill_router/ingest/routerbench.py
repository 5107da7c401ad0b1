"""RouterBench table, exported as Parquet or CSV: one row per prompt, with every model's score, response and cost.

Source: withmartian/routerbench, convertors/common.py and utils.py, and the files routerbench_0shot.pkl and
routerbench_5shot.pkl: sample_id, prompt, eval_name, oracle_model_to_route_to, and MODEL, MODEL|model_response and
MODEL|total_cost, in USD, for each model. The long form, routerbench_raw.pkl, has model_name, performance and
total_cost, or cost, instead. A prompt may be a Python list of its turns, such as "['first', 'second']"; they are joined
by a blank line. A missing score was never graded. The published files are pickles, which can run code on loading, and
are refused.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Iterator, Sequence

import pyarrow as pa

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus.formats import column_values
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, check_unique, open_csv, require_columns
from prefill_router.ingest.records import CATEGORY, Format, Item, Options, Record, Unknown, text
from prefill_router.storage.parquet_files import batch_rows

_USED = ("sample_id", "prompt", "eval_name")
_KNOWN = ("oracle_model_to_route_to",)
_LONG = ("model_name", "performance")
_LONG_COSTS = ("total_cost", "cost")
_LONG_KNOWN = ("model_response", *_LONG_COSTS, "index")
_COST = "|total_cost"
_OF_MODEL = ("|model_response", _COST)
_BATCH_ROWS = 256


def read(uri: str, options: Options) -> Iterator[Item]:
    if uri.lower().endswith(".parquet"):
        yield from _read_parquet(uri)
        return
    with open_csv(uri, options.max_record_bytes) as table:
        columns = _Columns(uri, table.columns)
        yield from columns.unknown()
        for row, _, fields in table.rows():
            yield BadRow(uri, row, None, fields) if isinstance(fields, str) else columns.record(row, fields)


def _read_parquet(uri: str) -> Iterator[Item]:
    try:
        with storage.open_parquet(uri) as file:
            columns = _Columns(uri, file.schema_arrow.names)
            yield from columns.unknown()
            for first_row, batch in _batches(uri, file, columns.used):
                rows = zip(*(column_values(batch, name) for name in columns.used), strict=True)
                for row, values in enumerate(rows, first_row):
                    yield columns.record(row, dict(zip(columns.used, values, strict=True)))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if storage.is_failure_of_storage(error):
            raise
        raise UserError(f"{uri}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _batches(uri: str, file: pa.parquet.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    row = 0
    for group in range(file.num_row_groups):  # one at a time: a reader of several keeps all it has fetched in memory
        size = batch_rows(uri, file.metadata.row_group(group), columns, _BATCH_ROWS)
        for batch in file.iter_batches(size, row_groups=[group], columns=list(columns)):
            yield row, batch
            row += len(batch)


class _Columns:
    """The roles of one file's columns. Raises UserError if they are not RouterBench's."""

    def __init__(self, uri: str, names: Sequence[str]) -> None:
        check_unique(uri, names)
        require_columns(uri, names, ["prompt"])
        self.uri, self.names = uri, names
        self.is_long = all(name in names for name in _LONG)
        self.models = [] if self.is_long else [m for m in names if any(m + suffix in names for suffix in _OF_MODEL)]
        if not self.is_long and not self.models:
            raise UserError(f"{uri}: no model found: needs columns MODEL and MODEL|total_cost or MODEL|model_response")
        of_models = [*self.models, *(model + _COST for model in self.models)]
        wanted = (*_LONG, *_LONG_COSTS) if self.is_long else of_models
        self.used = [name for name in (*_USED, *wanted) if name in names]

    def unknown(self) -> Iterator[Item]:
        of_models = [model + suffix for model in self.models for suffix in _OF_MODEL]
        known = _LONG_KNOWN if self.is_long else of_models
        yield from Unknown([*self.used, *_KNOWN, *known]).among(self.names)

    def record(self, row: int, fields: Fields) -> Record:
        if self.is_long:
            cost = next((fields[name] for name in _LONG_COSTS if name in fields), None)
            answers = [RawAnswer(fields["model_name"], _score(fields["performance"]), None, cost)]
        else:
            answers = [RawAnswer(m, _score(fields[m]), None, fields.get(m + _COST)) for m in self.models]
        extras = {CATEGORY.name: text(fields.get("eval_name"))}
        prompt_id = text(fields.get("sample_id"))
        return Record(self.uri, row, _joined(fields["prompt"]), answers, prompt_id, extras=extras)


def _score(value: object) -> object:
    """A score, None for NaN, which pandas writes for missing values."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _joined(prompt: object) -> object:
    turns = prompt
    if isinstance(prompt, str) and prompt.startswith(("['", '["')) and prompt.endswith("]"):
        try:
            with warnings.catch_warnings(action="ignore"):  # from text that only looks like a list
                turns = ast.literal_eval(prompt)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return prompt
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return "\n\n".join(turns)
    return prompt


FORMAT = Format("routerbench", (".parquet", ".csv"), read, (CATEGORY,))
