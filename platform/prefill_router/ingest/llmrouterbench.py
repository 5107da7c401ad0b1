"""LLMRouterBench results: one JSON object per dataset, split and model, with a list of records.

Source: ynulihao/LLMRouterBench, data_collector/storage.py, which writes
bench/DATASET/SPLIT/MODEL/DATASET-SPLIT-MODEL-TIME.json, and README.md, "Data Format". A record has prompt, score in
[0, 1], completion_tokens and cost in USD; a null score was never graded. Older files lack model_name, and take it from
their folder. Demo runs over the first few prompts are skipped, as LLMRouterBench does. The newest of several runs of a
model on a dataset counts: it is read first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefill_router.common.errors import UserError, shown
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_json
from prefill_router.ingest.records import CATEGORY, Format, Ignored, Item, Options, Record, Unknown, text
from prefill_router.storage.compression import open_bytes

_KNOWN = (
    *("index", "origin_query", "prompt", "prediction", "ground_truth", "score", "prompt_tokens", "completion_tokens"),
    *("cost", "raw_output", "extra_fields"),
)


def read(uri: str, options: Options) -> Iterator[Item]:
    about: dict[str, Any] = {}  # metadata of the run, which precedes the records in the file
    unknown = Unknown(_KNOWN)
    has_records = False
    with open_bytes(uri) as stream:
        for member in read_json(uri, stream, options.max_record_bytes):
            if member.key is None:
                raise UserError(f"{uri}: must be a JSON object with a list of records, but is a list")
            if member.key != "records" or member.place is None:
                about[member.key] = member.value
            elif about.get("demo") is True:
                yield Ignored("demo run")
                return
            elif isinstance(member.value, dict):
                has_records = True
                yield from unknown.among(member.value)
                yield _record(uri, member.place, member.value, about, options)
            else:
                has_records = True
                yield BadRow(uri, member.place, None, f"must be a JSON object, not {shown(member.value)}")
    if not has_records:
        raise UserError(f"{uri}: has no list of records, only {', '.join(about) or 'an empty object'}")


def _record(uri: str, row: int, fields: Fields, about: dict[str, Any], options: Options) -> Record:
    folders = uri.split("/")[:-1]
    folder = dict(zip(("model_name", "split", "dataset_name"), reversed(folders), strict=False))
    target = options.target or about.get("model_name") or folder.get("model_name")
    answer = RawAnswer(target, fields.get("score"), fields.get("completion_tokens"), fields.get("cost"))
    prompt = fields.get("prompt") or fields.get("origin_query")
    messages = prompt if isinstance(prompt, list) else None
    category = text(about.get("dataset_name") or folder.get("dataset_name"))
    return Record(uri, row, prompt, [answer], messages=messages, extras={CATEGORY.name: category})


FORMAT = Format(
    "llmrouterbench",
    (".json",),
    read,
    (CATEGORY,),
    has_messages=True,
    takes_target=True,
    newest_first=True,
)
