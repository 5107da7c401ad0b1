"""What a format's reader hands on: records as a file has them, unchecked, and what the file holds besides.

Readers only find things. Whether a prompt can be encoded, a grade is one and a pair stands twice is judged in one
place, `tables`, for all formats alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from prefill_router.common.errors import shown
from prefill_router.corpus.reader import MAX_PROMPT_BYTES, BadRow

CATEGORY = pa.field("category", pa.string())  # the benchmark, task or subject that a prompt is from
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SOURCE = pa.field("source", pa.string())  # what the prompt was taken from, as its file says

_MAX_UNKNOWN = 64  # names of unknown columns that are kept of one file


class RawAnswer(NamedTuple):
    """A target's answer to a prompt; `correct` is None where it was never graded."""

    target: object
    correct: object
    output_tokens: object = None


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt, with the answers to it that stand in the same row; `row` counts from 0 in its file."""

    uri: str
    row: int
    prompt: object
    answers: Sequence[RawAnswer] = ()
    prompt_id: str | None = None  # a hash of the content where the format gives none
    messages: object = None  # a conversation, in place of `prompt`
    extras: Mapping[str, object] = field(default_factory=dict)  # by the names of the format's extra columns
    identity: str | None = None  # what must agree wherever `prompt_id` stands again, if it is not the prompt's text


class Ignored(NamedTuple):
    """Something that has no place in our tables, such as a column that the format is not known to have."""

    what: str


Item = Record | BadRow | Ignored


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may say about any source."""

    target: str | None = None  # the model whose answers they are, where the files do not tell
    max_prompt_bytes: int = MAX_PROMPT_BYTES

    @property
    def max_record_bytes(self) -> int:
        """Escapes may make a prompt six times as long, and whole answers stand beside it."""
        return 64 * max(self.max_prompt_bytes, MAX_PROMPT_BYTES)


@dataclass(frozen=True, slots=True)
class Format:
    """A way in which others keep graded answers; `read` yields what one file of it holds.

    `read` raises UserError where the file as a whole is not of the format.
    """

    name: str
    about: str
    suffixes: tuple[str, ...]
    read: Callable[[str, Options], Iterator[Item]]
    extras: tuple[pa.Field, ...] = ()
    has_messages: bool = False
    takes_target: bool = False  # its records do not name the model: its files do, or the user
    newest_first: bool = False  # files that repeat a run carry its date: the newest, read first, is the one that counts
    is_wanted: Callable[[str], bool] = lambda _: True  # by the name of a file that lies in a folder
    is_companion: Callable[[str], bool] = lambda _: False  # files beside them that are known to hold no records


class Unknown:
    """Tells of each column once that is not among those that a format is known to have."""

    def __init__(self, known: Iterable[str]) -> None:
        self._told, self._left = set(known), _MAX_UNKNOWN

    def among(self, names: Iterable[str]) -> Iterator[Ignored]:
        for name in names:
            if name not in self._told and self._left:
                self._told.add(name)
                self._left -= 1
                yield Ignored(f"column {shown(name)}" if self._left else "further columns")


def text(value: object) -> str | None:
    """A value as text for an extra column, None where there is none."""
    if value is None or value == "":
        return None
    return (value if isinstance(value, str) else str(value)).encode("utf-8", "replace").decode()


def lettered(options: Sequence[object], letters: Sequence[object] = LETTERS) -> str:
    """Options of a multiple-choice question, a line each: `A. first`. There must be a letter for each."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters[: len(options)], options, strict=True))
