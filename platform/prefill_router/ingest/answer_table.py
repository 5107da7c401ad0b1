"""A user's own table of graded answers, in any format of a corpus, wide or long.

A wide table has a row for each prompt and a column of grades for each model, from 0 to 1 or of true and false; columns
`MODEL_cost_usd` and `MODEL_output_tokens` may stand beside it. A long table has a row for each answer: a column
`target` or `model`, a column of grades, and possibly `cost_usd` and `output_tokens`. Further names are below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prefill_router.common.errors import UserError, shown
from prefill_router.common.schema import CORRECT, COST_USD, MESSAGES, OUTPUT_TOKENS, PROMPT, PROMPT_ID, TARGET
from prefill_router.corpus.formats import SUFFIXES, read_records
from prefill_router.corpus.grades import RawAnswer, is_grade
from prefill_router.corpus.reader import BadRow
from prefill_router.corpus.text_files import Fields
from prefill_router.ingest.records import CATEGORY, SOURCE, Format, Item, Options, Record, Unknown, text

_PROMPTS = (PROMPT, "question", "query", "input", "instruction", "text")
_IDS = (PROMPT_ID, "id")
_TARGETS = (TARGET, "model")
_GRADES = (CORRECT, "is_correct", "isCorrect", "score", "reward", "grade")
_COSTS, _LENGTHS = (COST_USD, "cost"), (OUTPUT_TOKENS, "completion_tokens")
_COST_OF, _LENGTH_OF = f"_{COST_USD}", f"_{OUTPUT_TOKENS}"
_EXTRAS = (CATEGORY, SOURCE)
_ROWS_SEEN = 200  # of a file, to find the columns of its models

Answers = Callable[[Fields], list[RawAnswer]]


def read(uri: str, options: Options) -> Iterator[Item]:
    records = read_records(uri, list, 0, 0, options.max_record_bytes)
    first = list(itertools.islice(records, _ROWS_SEEN))
    seen = [fields for _, _, fields in first if not isinstance(fields, str)]
    names = list(dict.fromkeys(name for fields in seen for name in fields))
    table = _layout(uri, names, seen) if seen else None
    used = table.used if table else ()
    unused = {name: _no_grade(name, seen) for name in names if name not in used}
    reasons = {name: f"{value} is no grade from 0 to 1" for name, value in unused.items() if _is_number(value)}
    yield from Unknown(used).among(names, reasons)
    for row, _, fields in itertools.chain(first, records):
        if table is None or isinstance(fields, str):
            yield BadRow(uri, row, None, str(fields))
        else:
            yield table.record(uri, row, fields)


@dataclass(frozen=True)
class _Layout:
    """Which columns of a file hold what."""

    prompt: str | None
    prompt_id: str | None
    answers: Answers
    used: tuple[str, ...]

    def record(self, uri: str, row: int, fields: Fields) -> Record:
        prompt_id = text(fields.get(self.prompt_id)) if self.prompt_id else None
        prompt = fields.get(self.prompt) if self.prompt else None
        extras = {field.name: text(fields.get(field.name)) for field in _EXTRAS}
        answers = self.answers(fields)
        return Record(uri, row, prompt, answers, prompt_id=prompt_id, messages=fields.get(MESSAGES), extras=extras)


def _layout(uri: str, names: Sequence[str], seen: Sequence[Fields]) -> _Layout:
    """Raises UserError if no column has prompts, or none grades."""
    prompt, prompt_id, target, grade = (_among(names, known) for known in (_PROMPTS, _IDS, _TARGETS, _GRADES))
    if prompt is None and MESSAGES not in names:
        raise UserError(
            f"{uri}: has no column of prompts: name it {PROMPT} or {MESSAGES}; it has {', '.join(names)[:200]}"
        )
    common = [name for name in (prompt, prompt_id, MESSAGES, *(field.name for field in _EXTRAS)) if name]
    if target and grade:
        cost, length = _among(names, _COSTS), _among(names, _LENGTHS)
        own = [name for name in (target, grade, cost, length) if name]
        return _Layout(prompt, prompt_id, _long(target, grade, length, cost), (*common, *own))
    models = _models([name for name in names if name not in common], seen)
    if not models:
        values = ", ".join(f"{name} = {shown(_no_grade(name, seen))}" for name in names if name not in common)
        raise UserError(
            f"{uri}: has no column of grades: give each model a column of numbers from 0 to 1, or of true and false; "
            f"it has {values[:300] or 'prompts alone'}"
        )
    own = [model + suffix for model in models for suffix in ("", _LENGTH_OF, _COST_OF)]
    return _Layout(prompt, prompt_id, _wide(models), (*common, *own))


def _long(target: str, grade: str, length: str | None, cost: str | None) -> Answers:
    def answers(fields: Fields) -> list[RawAnswer]:
        tokens, usd = (_known(fields.get(name)) if name else None for name in (length, cost))
        return [RawAnswer(fields.get(target), _known(fields.get(grade)), tokens, usd)]

    return answers


def _wide(models: Sequence[str]) -> Answers:
    def answers(fields: Fields) -> list[RawAnswer]:
        return [
            RawAnswer(
                model, _known(fields.get(model)), _known(fields.get(model + _LENGTH_OF)), fields.get(model + _COST_OF)
            )
            for model in models
        ]

    return answers


def _models(names: Sequence[str], seen: Sequence[Fields]) -> list[str]:
    """The columns whose values are grades: nothing else distinguishes the models'."""
    own = [name for name in names if name and not name.endswith((_COST_OF, _LENGTH_OF))]
    return [
        name
        for name in own
        if _first(name, seen) is not None and all(is_grade(_known(fields.get(name))) for fields in seen)
    ]


def _among(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _first(name: str, seen: Sequence[Mapping[str, object]]) -> object:
    """The first value of a column."""
    return next((value for fields in seen if (value := _known(fields.get(name))) is not None), None)


def _no_grade(name: str, seen: Sequence[Fields]) -> object:
    """The first value of a column that is no grade, or None for a column without values."""
    return next((fields.get(name) for fields in seen if not is_grade(_known(fields.get(name)))), None)


def _is_number(value: object) -> bool:
    try:
        return value is not None and math.isfinite(float(str(value)))
    except ValueError:
        return False


def _known(value: object) -> object:
    """A value, or None for NaN, which pandas writes for a missing one."""
    return None if isinstance(value, float) and math.isnan(value) else value


_PLAIN = tuple(suffix for suffix in SUFFIXES if suffix.count(".") == 1)
FORMAT = Format("table", _PLAIN, read, _EXTRAS, has_messages=True)
