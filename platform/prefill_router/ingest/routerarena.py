"""RouterArena predictions (a JSON list of prompts and the models that a router chose) and cached results (JSONL).

Source: RouteWorks/RouterArena. router_inference/predictions/ROUTER.json, which llm_evaluation/run.py grades: "global
index", prompt, prediction (the model), generated_result with token_usage, accuracy and cost, null until graded.
cached_results/MODEL.jsonl: global_index, question, llm_selected, token_usage, evaluation_result with score and
inference_cost. Costs are in USD. A failed call counts as ungraded. The files ROUTER-robustness.json reword the same
prompts under the same index: ingest them separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefill_router.common.errors import UserError, shown
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_json, read_jsonl
from prefill_router.ingest.records import CATEGORY, Format, Item, Options, Record, Unknown, text
from prefill_router.storage.compression import open_bytes, unpacked

_PREDICTION = ("global index", "prompt", "prediction", "generated_result", "cost", "accuracy", "for_optimality")
_CACHED = (
    *("global_index", "question", "llm_selected", "generated_answer", "token_usage", "success", "provider", "error"),
    *("run_number", "evaluation_result"),
)


def read(uri: str, options: Options) -> Iterator[Item]:
    unknown = Unknown([*_PREDICTION, *_CACHED])
    for row, fields in _rows(uri, options.max_record_bytes):
        if isinstance(fields, str):
            yield BadRow(uri, row, None, fields)
            continue
        yield from unknown.among(fields)
        yield _record(uri, row, fields)


def _rows(uri: str, max_bytes: int) -> Iterator[tuple[int, Fields | str]]:
    if unpacked(uri).endswith(".jsonl"):
        yield from ((row, fields) for row, _, fields in read_jsonl(uri, max_bytes))
        return
    with open_bytes(uri) as stream:
        for member in read_json(uri, stream, max_bytes):
            if member.place is None or member.key is not None:
                raise UserError(f"{uri}: must be a JSON list of predictions, but is an object")
            is_object = isinstance(member.value, dict)
            yield member.place, member.value if is_object else f"must be a JSON object, not {shown(member.value)}"


def _record(uri: str, row: int, fields: Fields) -> Record:
    index = text(fields.get("global index", fields.get("global_index")))
    if "llm_selected" in fields:
        prompt, target, result = fields.get("question"), fields["llm_selected"], fields
        graded = _object(fields.get("evaluation_result"))
        correct, cost_usd = graded.get("score"), graded.get("inference_cost")
    else:
        prompt, target, result = fields.get("prompt"), fields.get("prediction"), _object(fields.get("generated_result"))
        correct, cost_usd = fields.get("accuracy"), fields.get("cost")
    if result.get("success") is False:
        correct = None
    answer = RawAnswer(target, correct, _object(result.get("token_usage")).get("output_tokens"), cost_usd)
    # ArcMMLU_98 is the 98th of ArcMMLU.
    extras = {CATEGORY.name: (index or "").rpartition("_")[0] or None}
    return Record(uri, row, prompt, [answer], index, extras=extras)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


FORMAT = Format("routerarena", (".json", ".jsonl"), read, (CATEGORY,))
