"""A corpus of prompts: files in any format of `readers`, each row either fit or with the reason why not.

A bad row never ends the reading: in a billion prompts some are null, broken or gigantic, and none of them may cost the
others. What is wrong with a whole file, such as a missing column, is a UserError.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import unquote

from prefill_router import storage
from prefill_router.common.console import say
from prefill_router.common.errors import UnfitError, UserError, shown
from prefill_router.common.schema import MESSAGES, PROMPT, PROMPT_ID
from prefill_router.corpus import openai_requests
from prefill_router.corpus.formats import FORMATS, NOT_UTF8, is_of_records, is_readable, read_records
from prefill_router.corpus.text_files import Fields

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
_ROLES: tuple[str, ...] = get_args(Role)
MAX_PROMPT_BYTES = 1 << 20
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"

Message = dict[str, str]
Prompt = str | list[Message]  # a bare prompt, or the messages of a conversation


class Row(NamedTuple):
    """One prompt of a corpus; `id_is_hash` where the corpus gave no prompt_id."""

    prompt_id: str
    prompt: Prompt
    id_is_hash: bool
    extras: tuple[Any, ...] = ()  # of the columns that were asked for, None where a row has none

    @property
    def content_digest(self) -> bytes:
        return bytes.fromhex(self.prompt_id) if self.id_is_hash else content_digest(self.prompt)


class BadRow(NamedTuple):
    """A row that holds no prompt that could be encoded; `row` counts from 0 in its file."""

    uri: str
    row: int
    prompt_id: str | None  # None where it was not given, or is what is bad
    reason: str  # one short line: the key, its value, and what it must be

    @property
    def message(self) -> str:
        return f"{self.uri}: row {self.row + 1}: {self.reason}"


def content_digest(prompt: Prompt) -> bytes:
    """16 bytes of SHA-256 that stand for a prompt, whatever its id."""
    text = prompt if isinstance(prompt, str) else _canonical(prompt)
    return hashlib.sha256(text.encode()).digest()[:16]


def content_hash(prompt: Prompt) -> str:
    """The id of a prompt that came without one: its content digest, in hex."""
    return content_digest(prompt).hex()


def _canonical(messages: list[Message]) -> str:
    """What `json.dumps(messages, sort_keys=True, ensure_ascii=False)` gives, in a third of the time."""
    parts = [
        f'{{"content": {encode_basestring(m["content"])}, "role": {encode_basestring(m["role"])}}}' for m in messages
    ]
    return f"[{', '.join(parts)}]"


def id_digest(prompt_id: str) -> bytes:
    """8 bytes that stand for a prompt_id."""
    return hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()


def prompt_hash(prompt_id: str) -> int:
    """64 bits that stand for a prompt where ids would take too much room: in splits and in sets of seen prompts."""
    return int.from_bytes(id_digest(prompt_id), "little")


# --- reading -----------------------------------------------------------------------------------------------------

_ABSENT: Any = object()  # a column that the file, or a key that the row does not have


class Found(NamedTuple):
    """What lies where a corpus is: the files that are read, sorted, and those that nothing here reads."""

    files: list[str]
    others: list[str]


def find(uri: str) -> Found:
    """The file at `uri`, or what lies at any depth below it but names that `_` or `.` begins.

    Raises UserError where something is there that is neither a file nor a folder, such as a pipe.
    """
    files, others = storage.find(uri)
    if files == [uri]:
        return Found(files, [])
    visible = [file for file in files if not any(part.startswith("_") for part in file.removeprefix(uri).split("/"))]
    readable = [file for file in visible if is_readable(file)]
    with ThreadPoolExecutor() as pool:
        read = [file for file, fits in zip(readable, pool.map(is_of_records, readable), strict=True) if fits]
    return Found(read, sorted({*visible, *others}.difference(read)))


def files(uri: str) -> list[str]:
    """The files of a corpus: see `find`."""
    return find(uri).files


def tell_unread(uri: str, job: str) -> None:
    """Says which files of a corpus are none."""
    if others := find(uri).others:
        names = ", ".join(other.removeprefix(uri).lstrip("/") for other in others[:5])
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        say(f"{job}: not read, {len(others):,} of {uri}: {names}{more}: a corpus is one of {FORMATS}")


def refuse_output(out: str, uri: str) -> None:
    """Raises UserError where an output cannot be written, or would lie among the files of the corpus at `uri`."""
    storage.check_output(out)
    corpus, place = (f"{storage.absolute(folder).rstrip('/')}/" for folder in (uri, out))
    is_left_out = any(part.startswith(("_", ".")) for part in place.removeprefix(corpus).split("/"))
    if place.startswith(corpus) and not is_left_out:
        raise UserError(f"{out}: lies in {uri}, which is read, and so it would be too: choose another place")


def read(
    uri: str,
    first_row: int = 0,
    num_rows: int | None = None,
    offset: int = 0,
    max_prompt_bytes: int = MAX_PROMPT_BYTES,
    extras: Sequence[str] = (),
) -> Iterator[tuple[int, int, Row | BadRow]]:
    """Yields (row, offset, what it holds) for every row of one file from `first_row` on, which begins at `offset`.

    A row may also be a request (see `logged`). `extras` names further columns, or keys of JSON objects and structs as
    `metadata.team`, or of the folders that the file lies in, as `day=2026-11-29`; the rows carry their values.

    A row is good where it holds a conversation or, where there is none, a text; where its prompt_id, if the corpus
    gives any, is a string or an integer; and where none of them is empty, has more than `max_prompt_bytes` in UTF-8 or
    is not Unicode. White space alone is no prompt. Rows count from 0, blank lines not among them.

    Raises UserError where the file as a whole cannot be read: another format than its suffix says, no column with
    prompts, a CSV whose quotes do not match.
    """
    # Escapes may make a prompt six times as long, and other fields stand beside it.
    max_line_bytes = 16 * max(max_prompt_bytes, MAX_PROMPT_BYTES)
    keys = folder_keys(uri) if extras else {}
    records = read_records(uri, partial(_chosen, uri, extras), first_row, offset, max_line_bytes)
    for row, position, fields in itertools.islice(records, num_rows):
        if isinstance(fields, str):
            yield row, position, BadRow(uri, row, None, fields)
        else:
            found = tuple([_extra(fields, name, keys) for name in extras])
            yield row, position, _checked(fields, found, uri, row, max_prompt_bytes)


def _chosen(uri: str, extras: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns to read of a table. Raises UserError where it has none with prompts."""
    if not any(name in names for name in (PROMPT, MESSAGES, *openai_requests.WRAPPERS)):
        raise UserError(f"{uri}: has neither {PROMPT} nor {MESSAGES} among its columns: {', '.join(names)[:200]}")
    used = [
        PROMPT_ID,
        PROMPT,
        MESSAGES,
        *openai_requests.BESIDE_MESSAGES,
        *extras,
        *(name.split(".")[0] for name in extras),
    ]
    if PROMPT not in names and MESSAGES not in names:
        used += openai_requests.KEYS
    chosen = [name for name in dict.fromkeys(used) if name in names]
    for name in chosen:
        if names.count(name) > 1:
            raise UserError(f"{uri}: has {names.count(name)} columns {name}, must have one")
    return chosen


def folder_keys(uri: str) -> dict[str, str]:
    """What the folders of a file are called, as Hive and Spark partition: day=2026-11-29/country=de."""
    parts = (part.partition("=") for part in uri.split("/")[:-1])
    return {key: unquote(value) for key, equals, value in parts if key and equals and value != _NO_VALUE}


def _extra(fields: Fields, name: str, keys: dict[str, str]) -> Any:
    """A value by its key, by the keys that lead to it, by what a request's log calls it, or by the folder's name."""
    value: Any = fields
    for key in [name] if name in fields else name.split("."):
        value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
    value = openai_requests.extra(fields, name) if value is _ABSENT else value
    return keys.get(name) if value is None else value


# --- what a row must hold ----------------------------------------------------------------------------------------


def _checked(fields: Fields, extras: tuple[Any, ...], uri: str, row: int, max_bytes: int) -> Row | BadRow:
    given = fields.get(PROMPT_ID, _ABSENT)
    try:
        prompt = _prompt(fields, max_bytes)
        if given is _ABSENT:
            return Row(content_hash(prompt), prompt, True, extras)
        return Row(fit_id(given, max_bytes), prompt, False, extras)
    except UnfitError as problem:
        return BadRow(uri, row, _readable_id(given, max_bytes), str(problem))


def _prompt(fields: Fields, max_bytes: int) -> Prompt:
    prompt = fields.get(PROMPT)
    if not isinstance(prompt, str) or fields.get(MESSAGES) is not None or "request" in fields or "body" in fields:
        prompt, messages, _ = openai_requests.prompt_of(fields)  # which takes as long as all else
        if messages is not None:
            return fit_messages(messages, max_bytes)
    return fit_prompt(prompt, max_bytes)


def fit_id(value: object, max_bytes: int) -> str:
    """A prompt_id, which may be a whole number. Raises UnfitError where `value` is none."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return fit_text(str(value) if is_number else value, PROMPT_ID, max_bytes)


def fit_prompt(value: object, max_bytes: int, key: str = PROMPT) -> str:
    """A bare prompt as text. Raises UnfitError where `value` is none, and calls it `key`."""
    text = fit_text(value, key, max_bytes)
    if text.isspace():
        raise UnfitError(f"{key} = {shown(text)}, must hold more than white space")
    return text


def _readable_id(value: object, max_bytes: int) -> str | None:
    try:
        return fit_id(value, max_bytes)
    except UnfitError:
        return None


def fit_text(value: object, key: str, max_bytes: int) -> str:
    """A text that is not empty. Raises UnfitError where `value` is none, and calls it `key`."""
    if isinstance(value, str) and value.isascii() and 0 < len(value) <= max_bytes:
        return value  # nearly always; what follows takes three times as long
    text = _unicode(value)
    if not isinstance(text, str) or not text:
        raise UnfitError(f"{key} = {shown(text)}, must be a non-empty string")
    size = _num_bytes(text, key)
    if size > max_bytes:
        raise UnfitError(f"{key} = {shown(text)}, has {size:,} bytes, must have at most {max_bytes:,}")
    return text


def _unicode(value: object) -> object:
    """Text of a Parquet column that is not declared as text, or is not UTF-8, comes as bytes."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _num_bytes(text: str, key: str) -> int:
    """The size of a text in UTF-8."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise UnfitError(f"{key} = {shown(text)}, holds half a character or bytes that are not UTF-8") from None


def check_messages(value: object, where: str) -> list[Message]:
    """A conversation as [{"role": ..., "content": ...}], of any size. Raises UserError where it is none."""
    try:
        return fit_messages(value)
    except UnfitError as problem:
        raise UserError(f"{where}: {problem}") from None


def fit_messages(value: object, max_bytes: float = math.inf) -> list[Message]:
    """A conversation as messages of role and content. Raises UnfitError where `value` is none."""
    if value == NOT_UTF8:
        raise UnfitError(f"{MESSAGES} holds bytes that are not UTF-8")
    if not isinstance(value, list) or not value:
        raise UnfitError(f"{MESSAGES} = {shown(value)}, must be a non-empty list of role and content")
    messages, size = [], 0
    for i, item in enumerate(value):
        message = _message(item, key := f"{MESSAGES}[{i}]")
        messages.append(message)
        size += _num_bytes(message["content"], key)
    if not any(message["content"].strip() for message in messages):
        raise UnfitError(f"{MESSAGES} = {shown(messages)}, must hold more than white space")
    if size > max_bytes:
        raise UnfitError(f"{MESSAGES} = {shown(messages)}, has {size:,} bytes, must have at most {max_bytes:,}")
    return messages


def _message(value: object, key: str) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise UnfitError(f"{key} = {shown(value)}, must have role and content")
    role, content = _unicode(value["role"]), _unicode(value["content"])
    if role not in _ROLES:
        raise UnfitError(f"{key}.role = {shown(role)}, must be one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise UnfitError(f"{key}.content = {shown(content)}, must be a string")
    return {"role": role, "content": content}
