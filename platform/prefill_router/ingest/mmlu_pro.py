"""MMLU-Pro answers as published by its authors: one zip per model, of JSON lists with one record per question.

Source: TIGER-AI-Lab/MMLU-Pro, eval_results/model_outputs_MODEL_Nshots.zip, and evaluate_from_api.py and
evaluate_from_local.py, which write the records: question_id, question, options, answer, category, src, pred,
model_outputs. A zip holds one list, or one per subject; a file with "summary" in its name has totals only. Unzipped
JSON files are read as well.

An answer is right if the letter found in it, `pred`, equals `answer`. If no letter was found, the benchmark guesses one
with a seeded draw; here such an answer is wrong, as it is for a user. If the model gave no answer, it is ungraded.
Questions and options are stripped, since some were published with a leading space.

Zip members are streamed and never written to disk, so that their paths cannot escape a folder and a zip bomb costs
time, not memory. A member of more than 4 GiB is refused.
"""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, TypeGuard

from prefill_router import storage
from prefill_router.common.errors import UserError, shown
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields, read_json
from prefill_router.ingest.records import (
    CATEGORY,
    LETTERS,
    SOURCE,
    Format,
    Ignored,
    Item,
    Options,
    Record,
    Unknown,
    lettered,
    text,
)
from prefill_router.storage.compression import open_bytes

_MAX_MEMBER_BYTES = 4 << 30
_OUTPUTS = ("model_outputs", "generated_text", "response")  # names of the answer's field, by the script that wrote it
_KNOWN = (
    *("question_id", "question", "options", "answer", "answer_index", "cot_content", "category", "src", "pred"),
    *_OUTPUTS,
)


def read(uri: str, options: Options) -> Iterator[Item]:
    target = options.target or _target(uri)
    if not uri.lower().endswith(".zip"):
        with open_bytes(uri) as stream:
            yield from _records(uri, stream, target, options)
        return
    with storage.open_input(uri) as raw:
        try:
            yield from _read_zip(uri, raw, target, options)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, OSError) as error:
            if storage.is_failure_of_storage(error):
                raise
            raise UserError(f"{uri}: cannot read the zip file: {error}") from None


def _target(uri: str) -> str:
    """The model's name, from the file name, or from the folder with one file per subject."""
    *folders, name = uri.split("/")
    if match := re.fullmatch(r"model_outputs_(.+?)(_\d+shots?)?(\.json)?\.(zip|json)(\.gz|\.zst)?", name):
        return match[1]
    # evaluate_from_local.py: MODEL/CoT/SUBJECTS/subject.json. evaluate_from_api.py: MODEL/subject_result.json
    if len(folders) > 2 and folders[-2] == "CoT":
        return folders[-3]
    if "_result.json" in name and folders:
        return folders[-1]
    raise UserError(f"{uri}: unknown model: the file name is not like model_outputs_MODEL_5shots.zip: set --target")


def _read_zip(uri: str, raw: IO[bytes], target: str, options: Options) -> Iterator[Item]:
    with zipfile.ZipFile(raw) as archive:
        members = [info for info in archive.infolist() if not info.is_dir() and not _is_hidden(info.filename)]
        members = [info for info in members if not _is_summary(info.filename)]
        if not any(info.filename.lower().endswith(".json") for info in members):
            raise UserError(f"{uri}: holds no JSON file with answers")
        for info in members:
            where = f"{uri}#{info.filename}"
            if not info.filename.lower().endswith(".json"):
                yield Ignored(f"file {shown(storage.name(info.filename))} in a zip")
                continue
            if info.flag_bits & 1:
                raise UserError(f"{where}: is encrypted: unpack it first")
            if info.header_offset < 0:
                raise zipfile.BadZipFile(f"{info.filename} has a negative offset")
            if info.file_size > _MAX_MEMBER_BYTES:
                raise UserError(f"{where}: unpacks to {info.file_size:,} bytes, more than {_MAX_MEMBER_BYTES:,}")
            with archive.open(info) as member:
                yield from _records(where, member, target, options)


def _is_hidden(path: str) -> bool:
    *folders, name = path.split("/")
    return name.startswith(".") or "__MACOSX" in folders


def _is_summary(path: str) -> bool:
    return "summary" in path.lower().rpartition("/")[2]


def _records(uri: str, stream: IO[bytes], target: str, options: Options) -> Iterator[Item]:
    unknown = Unknown(_KNOWN)
    for row, member in enumerate(read_json(uri, stream, options.max_record_bytes)):
        if member.place is None:
            raise UserError(f"{uri}: must hold lists of answers, but {shown(member.key)} is not a list")
        if not isinstance(member.value, dict):
            yield BadRow(uri, row, None, f"must be a JSON object with question and options, not {shown(member.value)}")
            continue
        yield from unknown.among(member.value)
        yield _record(uri, row, member.value, target)


def _record(uri: str, row: int, fields: Fields, target: str) -> Record | BadRow:
    question, choices = fields.get("question"), fields.get("options")
    number = fields.get("question_id")
    prompt_id = None if number is None else f"mmlu-pro-{text(number)}"
    if not isinstance(question, str) or not question.strip():
        return BadRow(uri, row, prompt_id, f"question = {shown(question)}, must be a non-empty string")
    if not _are_options(choices):
        return BadRow(uri, row, prompt_id, f"options = {shown(choices)}, must be a list of 1 to 26 strings")
    if "pred" not in fields or not isinstance(fields.get("answer"), str):
        return BadRow(uri, row, prompt_id, "cannot be graded: pred or answer is missing")
    prompt = f"{question.strip()}\n\n{lettered([choice.strip() for choice in choices])}"
    extras = {CATEGORY.name: text(fields.get("category")), SOURCE.name: text(fields.get("src"))}
    return Record(uri, row, prompt, [RawAnswer(target, _correct(fields))], prompt_id, extras=extras)


def _are_options(choices: object) -> TypeGuard[list[str]]:
    if not isinstance(choices, list) or not 0 < len(choices) <= len(LETTERS):
        return False
    return all(isinstance(choice, str) for choice in choices)


def _correct(fields: Fields) -> bool | None:
    if fields["pred"]:
        return bool(fields["pred"] == fields["answer"])
    return False if any(fields.get(name) for name in _OUTPUTS) else None


FORMAT = Format(
    "mmlu-pro",
    (".zip", ".json"),
    read,
    (CATEGORY, SOURCE),
    takes_target=True,
    is_companion=_is_summary,
)
