"""LLMRouter (UIUC) routing data: JSONL with one line per query and model.

Source: ulab-uiuc/LLMRouter, llmrouter/data/README.md, "Routing Data JSONL", and api_calling_evaluation.py, which writes
it. `performance` is in [0, 1]. `query` lacks the options of a multiple-choice question, which are in `choices`: they
are appended, since the models saw them and many questions differ in nothing else. A failed call has a response that
begins with ERROR: and a grade like an answer. It counts as ungraded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from prefill_router.common.errors import InvalidRowError, shown
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_jsonl
from prefill_router.ingest.records import (
    CATEGORY,
    LETTERS,
    Format,
    Item,
    Options,
    Record,
    Unknown,
    lettered,
    text,
)

_USED = ("query", "choices", "task_name", "model_name", "performance", "output_tokens")
_KNOWN = (
    *("ground_truth", "metric", "task_id", "response", "formatted_query", "token_num", "input_tokens"),
    *("response_time", "api_key_used", "embedding_id", "user_id", "fig_id"),
)
_FAILED = ("ERROR:", "API Error")


def read(uri: str, options: Options) -> Iterator[Item]:
    unknown = Unknown([*_USED, *_KNOWN])
    for row, _, fields in read_jsonl(uri, options.max_record_bytes):
        if isinstance(fields, str):
            yield BadRow(uri, row, None, fields)
            continue
        yield from unknown.among(fields)
        try:
            prompt = _prompt(fields)
        except InvalidRowError as problem:
            yield BadRow(uri, row, None, str(problem))
            continue
        correct = None if str(fields.get("response")).startswith(_FAILED) else fields.get("performance")
        answer = RawAnswer(fields.get("model_name"), correct, fields.get("output_tokens"))
        yield Record(uri, row, prompt, [answer], extras={CATEGORY.name: text(fields.get("task_name"))})


def _prompt(fields: Fields) -> object:
    query, choices = fields.get("query"), fields.get("choices")
    if choices in (None, "", []) or not isinstance(query, str) or not query.strip():
        return query
    return f"{query}\n\n{_options(choices, is_code=fields.get('metric') == 'code_eval')}"


def _options(choices: object, *, is_code: bool) -> str:
    """Formats `choices`, a JSON string: {"text": [...], "labels": [...]}, with `label` as another key, or a plain list.

    For a coding task, it lists the tests that the code must pass.
    """
    value = choices
    if isinstance(choices, str):
        try:
            value = json.loads(choices)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, list) and (is_code or len(value) <= len(LETTERS)):
        return "\n".join(map(str, value)) if is_code else lettered(value)
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("labels", value.get("label"))
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return lettered(texts, labels)
    raise InvalidRowError(f"choices = {shown(choices)}, must be JSON: text and labels of equal length, or a list")


FORMAT = Format("llmrouter", (".jsonl",), read, (CATEGORY,))
