"""RouteLLM evaluation responses: a CSV with one prompt per row and one boolean column per model.

Source: lm-sys/RouteLLM, routellm/evals/mmlu/responses/mmlu_*.csv (prompt, mixtral-8x7b-instruct-v0.1,
gpt-4-1106-preview) and routellm/evals/gsm8k/gsm8k_responses.csv, which adds a column MODEL_response for each model.
RouteLLM lists contaminated prompts in other files; they are not removed. MT-Bench judgements, on a scale to 10, are not
supported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.corpus import text_files
from prefill_router.corpus.grades import RawAnswer, is_grade
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, open_csv, require_columns
from prefill_router.ingest.records import CATEGORY, Format, Item, Options, Record, Unknown

_RESPONSE = "_response"
_INDEX = "Unnamed:"  # pandas' name for a written index


def read(uri: str, options: Options) -> Iterator[Item]:
    category = storage.name(uri).partition(".csv")[0].removesuffix("_responses")
    with open_csv(uri, options.max_record_bytes) as table:
        require_columns(uri, table.columns, ["prompt"])
        rows = table.rows()
        start, first = _first_good(rows)
        models = _models(table.columns, first)
        if first and not models:
            raise UserError(f"{uri}: no column of true and false besides prompt: it has {', '.join(table.columns)}")
        yield from Unknown(["prompt", *models, *(model + _RESPONSE for model in models)]).among(table.columns)
        for row, _, fields in itertools.chain(start, rows):
            if isinstance(fields, str):
                yield BadRow(uri, row, None, fields)
            else:
                answers = [RawAnswer(model, fields[model]) for model in models]
                yield Record(uri, row, fields["prompt"], answers, extras={CATEGORY.name: category})


def _first_good(rows: Iterator[text_files.Record]) -> tuple[list[text_files.Record], Fields]:
    """The rows up to the first valid one, and that row's fields."""
    start: list[text_files.Record] = []
    for row in rows:
        start.append(row)
        if not isinstance(row[2], str):
            return start, row[2]
    return start, {}


def _models(columns: Sequence[str], first: Fields) -> list[str]:
    """The columns that have a grade in the first row: nothing else distinguishes the models' columns."""
    named = [c for c in columns if c and c != "prompt" and not c.startswith(_INDEX) and not c.endswith(_RESPONSE)]
    return [c for c in named if c in first and is_grade(first[c])]


FORMAT = Format("routellm", (".csv",), read, (CATEGORY,))
