"""Validates the records of any format and writes them as a corpus, outcomes and a quarantine of invalid rows.

Memory holds one part of each table, and about 200 bytes per prompt, whatever its length, to detect duplicates.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum, auto
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from prefill_router import storage
from prefill_router.common.console import say
from prefill_router.common.errors import InvalidRowError, UserError, shown
from prefill_router.common.schema import MESSAGES, OUTCOMES, PROMPT, PROMPT_ID
from prefill_router.corpus.grades import CheckedGrade, grade
from prefill_router.corpus.reader import (
    BadRow,
    Prompt,
    content_digest,
    id_digest,
    validate_messages,
    validate_prompt,
    validate_text,
)
from prefill_router.ingest.parts import Parts, Quarantine
from prefill_router.ingest.records import Format, Ignored, Item, Options, Record
from prefill_router.storage import parquet_objects

CORPUS_FOLDER, OUTCOMES_FOLDER, QUARANTINE_FOLDER = "corpus", "outcomes", "quarantine"
QUARANTINE_FILE, SUMMARY = "quarantine/rows.parquet", "summary.json"
_MESSAGES_TYPE = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))


@dataclass(frozen=True)
class TargetSummary:
    graded: int
    accuracy: float


@dataclass(frozen=True)
class IngestSummary:
    """Counts of an ingested source, as written to summary.json."""

    format: str
    source: str
    files: int
    files_ignored: int  # unexpected files in the folder
    records: int
    prompts: int  # rows of the corpus
    outcomes: int
    ungraded: int  # answers without a grade, which are no outcomes
    quarantined: int  # rows of the quarantine; a record with several invalid answers has several
    repeated_pairs: int  # quarantined grades of a prompt and target that already have one
    repeated_prompts: int  # records without answers whose prompt was read before
    other_wordings: int  # records whose prompt was read before in another wording
    targets: dict[str, TargetSummary]
    ignored: dict[str, int]  # unsupported fields and files, with their number of occurrences

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tables:
    """Context manager that writes a reader's items below `out`. Deletes everything it wrote if an error occurs.

    Earlier tables there are deleted once the first part of the new ones is written.
    """

    def __init__(self, out: str, kind: Format, options: Options) -> None:
        self.out, self.kind, self.options = out, kind, options
        self._seen = SeenPrompts()
        self._corpus = Parts(storage.join(out, CORPUS_FOLDER), _corpus_schema(kind), self._begin)
        self._outcomes = Parts(storage.join(out, OUTCOMES_FOLDER), OUTCOMES, self._begin)
        self._quarantine = Quarantine()
        self._ignored: Counter[str] = Counter()
        self._graded: Counter[str] = Counter()
        self._correct: defaultdict[str, float] = defaultdict(float)  # sums of grades
        self._has_begun = False
        self.num_records = self._num_ungraded = 0
        self._num_repeated_pairs = self._num_repeated_prompts = self._num_other_wordings = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._has_begun:
            clear(self.out)

    def _begin(self) -> None:
        if not self._has_begun:
            clear(self.out)
            self._has_begun = True

    def add(self, item: Item) -> None:
        if isinstance(item, Ignored):
            if not self._ignored[item.what]:
                say(f"ingest: ignored: {item.what}")
            self._ignored[item.what] += 1
            return
        self.num_records += 1
        if isinstance(item, BadRow):
            self._quarantine.add(item)
        else:
            self._add_record(item)

    def _add_record(self, record: Record) -> None:
        prompt_id = None
        try:
            if record.prompt_id is not None:
                prompt_id = validate_text(record.prompt_id, PROMPT_ID, self.options.max_prompt_bytes)
            prompt = _fit(record, self.options.max_prompt_bytes)
        except InvalidRowError as problem:
            self._refuse(record, prompt_id, str(problem))
            return
        content = content_digest(prompt)
        prompt_id = content.hex() if prompt_id is None else prompt_id
        grades = self._grades(record, prompt_id)
        if record.answers and not grades:
            return
        recurrence = self._seen.add(prompt_id, content, record.identity)
        if recurrence is Recurrence.CLASH:
            self._refuse(record, prompt_id, f"{PROMPT_ID} {shown(prompt_id)} already belongs to another prompt")
            return
        if recurrence is Recurrence.NEW:
            self._add_prompt(record, prompt_id, prompt)
        elif not record.answers:
            self._num_repeated_prompts += 1
        self._num_other_wordings += recurrence is Recurrence.OTHER_WORDING
        for one in grades:
            self._add_outcome(record, prompt_id, one)

    def _grades(self, record: Record, prompt_id: str) -> list[CheckedGrade]:
        grades = []
        for answer in record.answers:
            try:
                grades.append(grade(answer))
            except InvalidRowError as problem:
                self._refuse(record, prompt_id, str(problem))
        return grades

    def _add_prompt(self, record: Record, prompt_id: str, prompt: Prompt) -> None:
        is_text = isinstance(prompt, str)
        row: dict[str, object] = {
            PROMPT_ID: prompt_id,
            PROMPT: prompt if is_text else None,
            MESSAGES: None if is_text else prompt,
        }
        self._corpus.add({**row, **record.extras}, _num_chars(prompt))

    def _add_outcome(self, record: Record, prompt_id: str, one: CheckedGrade) -> None:
        if one.correct is None:
            self._num_ungraded += 1
        elif self._seen.add_grade(prompt_id, one.target):
            self._outcomes.add(dict(zip(OUTCOMES.names, (prompt_id, *one), strict=True)))
            self._graded[one.target] += 1
            self._correct[one.target] += one.correct
        else:
            self._num_repeated_pairs += 1
            self._refuse(record, prompt_id, f"target {shown(one.target)} already has a grade for this prompt")

    def _refuse(self, record: Record, prompt_id: str | None, reason: str) -> None:
        self._quarantine.add(BadRow(record.uri, record.row, prompt_id, reason))

    def finish(self, source: str, num_files: int, num_files_ignored: int = 0) -> IngestSummary:
        """Writes the remaining rows, then the summary. Raises UserError if no record was valid."""
        self._corpus.flush()
        self._outcomes.flush()
        if not self._corpus.num_rows:
            raise UserError(f"{source}: {self._nothing()}")
        self._quarantine.write(storage.join(self.out, QUARANTINE_FILE))
        summary = IngestSummary(
            format=self.kind.name,
            source=source,
            files=num_files,
            files_ignored=num_files_ignored,
            records=self.num_records,
            prompts=self._corpus.num_rows,
            outcomes=self._outcomes.num_rows,
            ungraded=self._num_ungraded,
            quarantined=self._quarantine.num_rows,
            repeated_pairs=self._num_repeated_pairs,
            repeated_prompts=self._num_repeated_prompts,
            other_wordings=self._num_other_wordings,
            targets={t: TargetSummary(n, self._correct[t] / n) for t, n in sorted(self._graded.items())},
            ignored=dict(self._ignored),
        )
        storage.write_json(storage.join(self.out, SUMMARY), summary.to_dict())
        return summary

    def _nothing(self) -> str:
        if self._quarantine.first is None:
            return f"no records of format {self.kind.name} found"
        return f"no valid records among {self.num_records:,}; the first error: {self._quarantine.first.message}"


def _corpus_schema(kind: Format) -> pa.Schema:
    messages = [pa.field(MESSAGES, _MESSAGES_TYPE)] if kind.has_messages else []
    fields = [pa.field(PROMPT_ID, pa.string(), nullable=False), pa.field(PROMPT, pa.string()), *messages]
    return pa.schema([*fields, *kind.extras])


def _fit(record: Record, max_bytes: int) -> Prompt:
    """The record's prompt. Raises InvalidRowError unless it is a conversation or a text of more than white space."""
    return (
        validate_prompt(record.prompt, max_bytes)
        if record.messages is None
        else validate_messages(record.messages, max_bytes)
    )


def _num_chars(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)


# --- duplicates --------------------------------------------------------------------------------------------------

_HALF = (1 << 64) - 1


class Recurrence(Enum):
    """The relation of a prompt to earlier ones."""

    NEW = auto()
    AGAIN = auto()
    OTHER_WORDING = auto()  # same id and identity, different text
    CLASH = auto()  # same id, different prompt


class SeenPrompts:
    """The prompts read so far, and the targets graded on each."""

    def __init__(self) -> None:
        # One integer per prompt: 64 bits of the content, 64 bits of the identity, one bit per target.
        self._prompts: dict[bytes, int] = {}
        self._bits: dict[str, int] = {}

    def add(self, prompt_id: str, content: bytes, identity: str | None) -> Recurrence:
        """Records a prompt by its id, the digest of its content and, if the format has one, its identity."""
        key = id_digest(prompt_id)
        known = content[:8] if identity is None else id_digest(identity)
        marks = int.from_bytes(content[:8] + known, "little")
        before = self._prompts.get(key)
        if before is None:
            self._prompts[key] = marks
            return Recurrence.NEW
        differs = before ^ marks
        if not differs & _HALF:
            return Recurrence.AGAIN
        return Recurrence.CLASH if differs >> 64 & _HALF else Recurrence.OTHER_WORDING

    def add_grade(self, prompt_id: str, target: str) -> bool:
        """Records a pair, and returns whether it is new. `add` must have recorded the prompt."""
        bit = 1 << (128 + self._bits.setdefault(target, len(self._bits)))
        key = id_digest(prompt_id)
        before = self._prompts[key]
        self._prompts[key] = before | bit
        return not before & bit


# --- the output folder -------------------------------------------------------------------------------------------


def refuse_own_output(files: Sequence[str], out: str) -> None:
    """Raises UserError if a file to read is one of the tables of `out`, which are deleted before they are written."""
    own = tuple(storage.absolute(storage.join(out, name)) + "/" for name in (CORPUS_FOLDER, OUTCOMES_FOLDER))
    for file in files:
        if storage.absolute(file).startswith(own):
            raise UserError(f"{file}: is in the output folder {out}, whose tables are replaced: choose another --out")


def check_folder(out: str, *, overwrite: bool) -> None:
    """Raises UserError if the output folder has other files among the tables, or tables and `overwrite` is false."""
    storage.check_output(out)
    folders = (CORPUS_FOLDER, OUTCOMES_FOLDER, QUARANTINE_FOLDER)
    held = [name for name in folders if storage.list_names(storage.join(out, name))]
    held += [SUMMARY] if storage.exists(storage.join(out, SUMMARY)) else []
    if held and not overwrite:
        raise UserError(f"{out}: already holds {', '.join(held)}: choose another --out, or replace it with --overwrite")
    for folder in (CORPUS_FOLDER, OUTCOMES_FOLDER):
        others = [name for name in storage.list_names(storage.join(out, folder)) if not parquet_objects.is_shard(name)]
        if others:
            raise UserError(f"{out}/{folder}: holds {others[0]}, which `ingest` did not write: choose another --out")


def clear(out: str) -> None:
    """Deletes only the files of `ingest` below `out`. The summary, which marks a complete output, goes first."""
    storage.remove(storage.join(out, SUMMARY))
    storage.remove(storage.join(out, QUARANTINE_FILE))
    for folder in (CORPUS_FOLDER, OUTCOMES_FOLDER):
        parquet_objects.remove_shards(storage.join(out, folder))
