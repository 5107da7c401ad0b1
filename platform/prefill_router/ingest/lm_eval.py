"""lm-evaluation-harness samples, written by --log_samples: JSONL with one line per document and filter.

Source: EleutherAI/lm-evaluation-harness, lm_eval/loggers/evaluation_tracker.py (OUTPUT/MODEL/samples_TASK_TIME.jsonl
beside results_TIME.json) and lm_eval/evaluator.py (doc_id, doc, target, arguments, resps, filtered_resps, filter,
metrics, doc_hash, and each metric under its own name). The prompt is the context given to the model, which is the first
argument of the first request; a conversation is in JSON.

A document is identified by its task, number and hash. Models may have seen it in different wordings, for example
through their chat templates; all are graded on the prompt that was read first. For a task with several filters, the
first filter in the file counts, with the first metric of exact_match, acc, ... and the metrics that the line lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from prefill_router import storage
from prefill_router.common.errors import UserError, shown
from prefill_router.corpus.grades import RawAnswer, is_grade
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_jsonl
from prefill_router.ingest.records import CATEGORY, Format, Ignored, Item, Options, Record, Unknown, text

_NAME = re.compile(r"samples_(?P<task>.+?)(?:_(?P<time>\d{4}-\d\d-\d\dT[\d.-]+))?\.jsonl(?:\.gz|\.zst)?")
_METRICS = ("exact_match", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc")
_KNOWN = (
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
)


def read(uri: str, options: Options) -> Iterator[Item]:
    match = _NAME.fullmatch(storage.name(uri))
    if match is None:
        raise UserError(f"{uri}: the file name must be samples_TASK_TIME.jsonl, as lm-eval writes it")
    task = match["task"]
    target = options.target or _target(uri, match["time"])
    unknown = Unknown([*_KNOWN, *_METRICS])
    graded_by: object = None
    for row, _, fields in read_jsonl(uri, options.max_record_bytes):
        if isinstance(fields, str):
            yield BadRow(uri, row, None, fields)
            continue
        graded_by = fields.get("filter") if graded_by is None else graded_by
        if fields.get("filter") != graded_by:
            yield Ignored(f"filter {shown(fields.get('filter'))} of {task}")
            continue
        yield from unknown.among(name for name in fields if name not in _named_metrics(fields))
        yield _record(uri, row, fields, task, target)


def _target(uri: str, time: str | None) -> str:
    """The model's name, from the results file beside the samples, else the folder's name."""
    folder = uri.rpartition("/")[0]
    results = storage.join(folder, f"results_{time}.json")
    if time and storage.is_file(results):
        found = storage.read_json(results)
        name = found.get("model_name") if isinstance(found, dict) else None
        if isinstance(name, str) and name:
            return name
    if not (name := storage.name(folder)):
        raise UserError(f"{uri}: unknown model: no results_TIME.json with model_name beside the file: set --target")
    return name


def _record(uri: str, row: int, fields: Fields, task: str, target: str) -> Record | BadRow:
    number = text(fields.get("doc_id"))
    prompt_id = None if number is None else f"{task}-{number}"
    metric = _metric(fields)
    if metric is None:
        return BadRow(uri, row, prompt_id, f"has no metric: expected {', '.join(_METRICS)}, or one listed in metrics")
    prompt = _context(fields.get("arguments"))
    messages = _conversation(prompt)
    return Record(
        uri,
        row,
        None if messages else prompt,
        [RawAnswer(target, fields[metric])],
        prompt_id,
        messages,
        {CATEGORY.name: task},
        text(fields.get("doc_hash")),
    )


def _metric(fields: Fields) -> str | None:
    """The first metric with a valid grade, else the first metric, whose invalid value is then reported."""
    held = [name for name in (*_METRICS, *_named_metrics(fields)) if name in fields]
    return next((name for name in held if is_grade(fields[name])), held[0] if held else None)


def _named_metrics(fields: Fields) -> list[str]:
    named = fields.get("metrics")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _context(arguments: Any) -> object:
    """The context in {"gen_args_0": {"arg_0": context, ...}, ...} or, in older files, [[context, ...], ...]."""
    if isinstance(arguments, dict):
        first = arguments.get("gen_args_0")
        return first.get("arg_0") if isinstance(first, dict) else first
    if isinstance(arguments, list) and arguments:
        first = arguments[0]
        return first[0] if isinstance(first, list) and first else first
    return arguments


def _conversation(context: object) -> list[Any] | None:
    """The messages of a context [JSON of messages], which chat models behind an API get, or None for text."""
    if not isinstance(context, list) or not context:
        return None
    try:
        messages = json.loads(context[0]) if isinstance(context[0], str) else context
    except (ValueError, RecursionError):
        return context
    return messages if isinstance(messages, list) else context


FORMAT = Format(
    "lm-eval",
    (".jsonl",),
    read,
    (CATEGORY,),
    has_messages=True,
    takes_target=True,
    newest_first=True,
    is_wanted=lambda name: _NAME.fullmatch(name) is not None,
    is_companion=lambda name: name.startswith("results_") and name.endswith(".json"),
)
