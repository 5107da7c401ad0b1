"""Training data of NVIDIA's LLM router toolkit: a CSV with one row per question and model.

Source: NVIDIA-AI-Blueprints/llm-router, docs/guide-data-collection.md and docs/training-guide.md: columns question,
model, isCorrect (1 or 0) and, optionally, output_tokens. Scripts around it add category and source, which are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import open_csv, require_columns
from prefill_router.ingest.records import CATEGORY, SOURCE, Format, Item, Options, Record, Unknown, text

_REQUIRED = ("question", "model", "isCorrect")
_EXTRAS = (CATEGORY, SOURCE)


def read(uri: str, options: Options) -> Iterator[Item]:
    with open_csv(uri, options.max_record_bytes) as table:
        require_columns(uri, table.columns, _REQUIRED)
        yield from Unknown([*_REQUIRED, "output_tokens", *(f.name for f in _EXTRAS)]).among(table.columns)
        for row, _, fields in table.rows():
            if isinstance(fields, str):
                yield BadRow(uri, row, None, fields)
                continue
            answer = RawAnswer(fields["model"], fields["isCorrect"], fields.get("output_tokens"))
            extras = {field.name: text(fields.get(field.name)) for field in _EXTRAS}
            yield Record(uri, row, fields["question"], [answer], extras=extras)


FORMAT = Format("toolkit", (".csv",), read, _EXTRAS)
