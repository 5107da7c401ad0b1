"""Request logs of an OpenAI-style endpoint: JSONL without grades, which becomes a corpus only.

`prefill_router.corpus.openai_requests` defines the lines. The corpus keeps the model and the answer's tokens if the log
has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from prefill_router.common.errors import InvalidRowError, shown
from prefill_router.common.schema import OUTPUT_TOKENS
from prefill_router.corpus.grades import output_tokens
from prefill_router.corpus.openai_requests import model_of, prompt_of, usage_of
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_jsonl
from prefill_router.ingest.records import Format, Ignored, Item, Options, Record, text

_EXTRAS = (pa.field("model", pa.string()), pa.field(OUTPUT_TOKENS, pa.int32()), pa.field("custom_id", pa.string()))


def read(uri: str, options: Options) -> Iterator[Item]:
    for row, _, fields in read_jsonl(uri, options.max_record_bytes):
        if isinstance(fields, str):
            yield BadRow(uri, row, None, fields)
            continue
        try:
            prompt, messages, left_out = prompt_of(fields)
            extras = _extras(fields)
        except InvalidRowError as problem:
            yield BadRow(uri, row, None, str(problem))
            continue
        for key in left_out:
            yield Ignored(f"key {shown(key)} of messages")
        yield Record(uri, row, prompt, messages=messages, extras=extras)


def _extras(fields: Fields) -> dict[str, object]:
    return {
        "model": text(model_of(fields)),
        OUTPUT_TOKENS: output_tokens(usage_of(fields)[OUTPUT_TOKENS]),
        "custom_id": text(fields.get("custom_id")),
    }


FORMAT = Format(
    "openai-log",
    (".jsonl",),
    read,
    _EXTRAS,
    has_messages=True,
)
