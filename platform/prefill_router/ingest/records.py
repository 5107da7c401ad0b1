"""The interface between formats and tables: readers yield unchecked records and ignored fields.

Readers only extract values. `tables` validates the prompts and grades, and detects duplicates, for all formats alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa

from prefill_router.common.errors import shown
from prefill_router.corpus.grades import RawAnswer
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, BadRow

CATEGORY = pa.field("category", pa.string())  # benchmark, task or subject of the prompt
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SOURCE = pa.field("source", pa.string())  # origin of the prompt according to the file

_MAX_UNKNOWN = 64  # reported unknown columns per file


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file: a prompt and its answers. `row` counts from 0."""

    uri: str
    row: int
    prompt: object
    answers: Sequence[RawAnswer] = ()
    prompt_id: str | None = None  # default: a hash of the content
    messages: object = None  # a conversation, in place of `prompt`
    extras: Mapping[str, object] = field(default_factory=dict)  # by the names of the format's extra columns
    identity: str | None = None  # must agree between records with the same `prompt_id`; default: the prompt


class Ignored(NamedTuple):
    """Data that our tables have no place for, such as an unknown column of a format."""

    what: str


Item = Record | BadRow | Ignored


@dataclass(frozen=True, slots=True)
class Options:
    """The user's options for reading a source."""

    target: str | None = None  # the model that answered, if the files do not name it
    max_prompt_bytes: int = MAX_PROMPT_BYTES

    @property
    def max_record_bytes(self) -> int:
        """The size limit of one record. Escapes can make a prompt six times as long, and records include answers."""
        return 64 * max(self.max_prompt_bytes, MAX_PROMPT_BYTES)


@dataclass(frozen=True, slots=True)
class Format:
    """A file format of graded answers. `read` yields the items of one file.

    It raises UserError if the file as a whole is not of the format.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[str, Options], Iterator[Item]]
    extras: tuple[pa.Field, ...] = ()
    has_messages: bool = False
    takes_target: bool = False  # records do not name the model; the file's path or the user does
    newest_first: bool = False  # file names end with the date of the run; the newest run is read first, and counts
    is_wanted: Callable[[str], bool] = lambda _: True  # by file name, for files in a folder
    is_companion: Callable[[str], bool] = lambda _: False  # known files without records


class Unknown:
    """Reports each column that is unknown to a format once."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known, self._left = set(known), _MAX_UNKNOWN

    def among(self, names: Iterable[str], reasons: Mapping[str, str] = MappingProxyType({})) -> Iterator[Ignored]:
        """Yields each unknown name, and the reason why it is left out if `reasons` has one."""
        for name in names:
            if name not in self._known and self._left:
                self._known.add(name)
                self._left -= 1
                reason = f": {reasons[name]}" if name in reasons else ""
                yield Ignored(f"column {shown(name)}{reason}" if self._left else "further columns")


def text(value: object) -> str | None:
    """A value as text for an extra column, None if it is empty."""
    if value is None or value == "":
        return None
    return (value if isinstance(value, str) else str(value)).encode("utf-8", "replace").decode()


def lettered(options: Sequence[object], letters: Sequence[object] = LETTERS) -> str:
    """The options of a multiple-choice question, one per line: `A. first`. Raises ValueError without enough letters."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters[: len(options)], options, strict=True))
