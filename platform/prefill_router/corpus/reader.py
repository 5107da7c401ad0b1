"""Reads a corpus of prompts, in any format of `formats`; yields each row as valid or with the reason why it is not.

An invalid row never stops the reading: of a billion prompts, some are null, malformed or huge. A problem with a whole
file, such as a missing column, is a UserError.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import unquote

from prefill_router import storage
from prefill_router.common.console import say
from prefill_router.common.errors import InvalidRowError, UserError, shown
from prefill_router.common.schema import MESSAGES, PROMPT, PROMPT_ID
from prefill_router.corpus import openai_requests
from prefill_router.corpus.formats import FORMATS, NOT_UTF8, is_of_records, is_readable, read_records
from prefill_router.corpus.text_files import Fields

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
_ROLES: tuple[str, ...] = get_args(Role)
MAX_PROMPT_BYTES = 1 << 20
_CONTENT_HASH = re.compile("[0-9a-f]{32}")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"

Message = dict[str, str]
Prompt = str | list[Message]  # a bare prompt, or the messages of a conversation


class Row(NamedTuple):
    """One valid row of a corpus; `id_is_hash` if the corpus has no prompt_id."""

    prompt_id: str
    prompt: Prompt
    id_is_hash: bool
    extras: tuple[Any, ...] = ()  # values of the requested columns, None where the row has none

    @property
    def content_digest(self) -> bytes:
        return bytes.fromhex(self.prompt_id) if self.id_is_hash else content_digest(self.prompt)


class BadRow(NamedTuple):
    """An invalid row: it has no prompt that can be encoded. `row` counts from 0 in its file."""

    uri: str
    row: int
    prompt_id: str | None  # None if it is missing or invalid
    reason: str  # one short line: the key, its value, and the requirement

    @property
    def message(self) -> str:
        return f"{self.uri}: row {self.row + 1}: {self.reason}"


def content_digest(prompt: Prompt) -> bytes:
    """16 bytes of SHA-256 of a prompt, independent of its id."""
    text = prompt if isinstance(prompt, str) else _canonical(prompt)
    return hashlib.sha256(text.encode()).digest()[:16]


def content_hash(prompt: Prompt) -> str:
    """The id of a prompt without a prompt_id: its content digest, in hexadecimal."""
    return content_digest(prompt).hex()


def content_bits(prompt_id: str) -> int | None:
    """The first 64 bits of a prompt's content, given its id; None if the id is not a hash of content."""
    return int.from_bytes(bytes.fromhex(prompt_id)[:8], "little") if _CONTENT_HASH.fullmatch(prompt_id) else None


def _canonical(messages: list[Message]) -> str:
    """Equals `json.dumps(messages, sort_keys=True, ensure_ascii=False)`, in a third of the time."""
    parts = [
        f'{{"content": {encode_basestring(m["content"])}, "role": {encode_basestring(m["role"])}}}' for m in messages
    ]
    return f"[{', '.join(parts)}]"


def id_digest(prompt_id: str) -> bytes:
    """8 bytes of BLAKE2b of a prompt_id."""
    return hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()


def prompt_hash(prompt_id: str) -> int:
    """A 64-bit hash of a prompt_id, for splits and sets of seen prompts, where ids would take too much memory."""
    return int.from_bytes(id_digest(prompt_id), "little")


# --- reading -----------------------------------------------------------------------------------------------------

_ABSENT: Any = object()  # the value of a column that the file lacks, or a key that the row lacks


class Found(NamedTuple):
    """The sorted files of a corpus, and the other files in its folder, which are not read."""

    files: list[str]
    others: list[str]


def corpora(uri: str) -> list[str]:
    """The URIs of a corpus that has several parts, `A,B`, or of the only one."""
    return uri.split(",") if "," in uri and not storage.exists(uri) else [uri]


def require_corpus(uri: str) -> None:
    """Raises UserError if there is no file or folder at `uri`, or at one of its parts."""
    for part in corpora(uri):
        storage.require(part, "corpus")


def find(uri: str) -> Found:
    """Finds the file at `uri`, or all files at any depth below it; skips names that begin with `_` or `.`.

    Files of a corpus of several parts are sorted part by part. Raises UserError if `uri` is neither a file nor a
    folder, such as a pipe.
    """
    parts = [_find(part) for part in corpora(uri)]
    return Found([file for part in parts for file in part.files], [other for part in parts for other in part.others])


def _find(uri: str) -> Found:
    files, others = storage.find(uri)
    if files == [uri]:
        return Found(files, [])
    visible = [file for file in files if not any(part.startswith("_") for part in file.removeprefix(uri).split("/"))]
    readable = [file for file in visible if is_readable(file)]
    with ThreadPoolExecutor() as pool:
        read = [file for file, fits in zip(readable, pool.map(is_of_records, readable), strict=True) if fits]
    return Found(read, sorted({*visible, *others}.difference(read)))


def files(uri: str) -> list[str]:
    """The sorted files of a corpus: see `find`."""
    return find(uri).files


def report_unread(uri: str, job: str) -> None:
    """Prints the files in the folder of a corpus that are not read."""
    if others := find(uri).others:
        names = ", ".join(other.removeprefix(uri).lstrip("/") for other in others[:5])
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        say(f"{job}: skipped {len(others):,} files of {uri}: {names}{more}: supported formats are {FORMATS}")


def refuse_output(out: str, uri: str) -> None:
    """Raises UserError if the output `out` cannot be written, or would be read as part of the corpus at `uri`."""
    storage.check_output(out)
    for part in corpora(uri):
        corpus, output = (f"{storage.absolute(folder).rstrip('/')}/" for folder in (part, out))
        is_skipped = any(name.startswith(("_", ".")) for name in output.removeprefix(corpus).split("/"))
        if output.startswith(corpus) and not is_skipped:
            raise UserError(f"{out}: is inside the input folder {part}: choose another --out")


def read(
    uri: str,
    first_row: int = 0,
    num_rows: int | None = None,
    offset: int = 0,
    max_prompt_bytes: int = MAX_PROMPT_BYTES,
    extras: Sequence[str] = (),
) -> Iterator[tuple[int, int, Row | BadRow]]:
    """Yields (row, offset, parsed row) for each row of one file from `first_row`, which begins at byte `offset`.

    A row may also be a request to an endpoint (see `openai_requests`). `extras` names more values to return with each
    row: columns, nested keys such as `metadata.team`, or keys of the file's folders, such as `day` of `day=2026-11-29`.

    A row is valid if it has a conversation or, failing that, a text; if its prompt_id, when present, is a string or an
    integer; and if each of them is Unicode, is not empty, and has at most `max_prompt_bytes` in UTF-8. A prompt of
    white space is invalid. Rows count from 0 and do not include blank lines.

    Raises UserError if the file as a whole cannot be read: its format does not match its suffix, it has no column with
    prompts, or it is a CSV with unbalanced quotes.
    """
    # Escapes may make a prompt six times as long, and the row has other fields.
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
    """The columns to read of a table. Raises UserError if none holds prompts, or if two have the same name."""
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
    """The partition keys in the names of a file's folders, as of Hive and Spark: day=2026-11-29/country=de."""
    parts = (part.partition("=") for part in uri.split("/")[:-1])
    return {key: unquote(value) for key, equals, value in parts if key and equals and value != _NO_VALUE}


def _extra(fields: Fields, name: str, keys: dict[str, str]) -> Any:
    """Looks up a value by key, by a path of keys, in a logged request, or in the names of the folders."""
    value: Any = fields
    for key in [name] if name in fields else name.split("."):
        value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
    value = openai_requests.extra(fields, name) if value is _ABSENT else value
    return keys.get(name) if value is None else value


# --- validation of a row -----------------------------------------------------------------------------------------


def _checked(fields: Fields, extras: tuple[Any, ...], uri: str, row: int, max_bytes: int) -> Row | BadRow:
    given = fields.get(PROMPT_ID, _ABSENT)
    try:
        prompt = _prompt(fields, max_bytes)
        if given is _ABSENT:
            return Row(content_hash(prompt), prompt, True, extras)
        return Row(validate_id(given, max_bytes), prompt, False, extras)
    except InvalidRowError as problem:
        return BadRow(uri, row, _readable_id(given, max_bytes), str(problem))


def _prompt(fields: Fields, max_bytes: int) -> Prompt:
    prompt = fields.get(PROMPT)
    if not isinstance(prompt, str) or fields.get(MESSAGES) is not None or "request" in fields or "body" in fields:
        prompt, messages, _ = openai_requests.prompt_of(fields)  # takes as long as the rest of the validation
        if messages is not None:
            return validate_messages(messages, max_bytes)
    return validate_prompt(prompt, max_bytes)


def validate_id(value: object, max_bytes: int) -> str:
    """Returns a prompt_id as text; it may be an integer. Raises InvalidRowError if `value` is not valid."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return validate_text(str(value) if is_number else value, PROMPT_ID, max_bytes)


def validate_prompt(value: object, max_bytes: int, key: str = PROMPT) -> str:
    """Returns a plain prompt as text. Raises InvalidRowError, which names `key`, if `value` is not valid."""
    text = validate_text(value, key, max_bytes)
    if text.isspace():
        raise InvalidRowError(f"{key} = {shown(text)}, must hold more than white space")
    return text


def _readable_id(value: object, max_bytes: int) -> str | None:
    try:
        return validate_id(value, max_bytes)
    except InvalidRowError:
        return None


def validate_text(value: object, key: str, max_bytes: int) -> str:
    """Returns a non-empty text. Raises InvalidRowError, which names `key`, if `value` is not valid."""
    if isinstance(value, str) and value.isascii() and 0 < len(value) <= max_bytes:
        return value  # the usual case: the general check takes three times as long
    text = _unicode(value)
    if not isinstance(text, str) or not text:
        raise InvalidRowError(f"{key} = {shown(text)}, must be a non-empty string")
    size = _num_bytes(text, key)
    if size > max_bytes:
        raise InvalidRowError(f"{key} = {shown(text)}, has {size:,} bytes, must have at most {max_bytes:,}")
    return text


def _unicode(value: object) -> object:
    """Decodes bytes, which Parquet columns yield if they are not declared as text or are not UTF-8."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _num_bytes(text: str, key: str) -> int:
    """The size of a text in UTF-8. Raises InvalidRowError if it is not valid Unicode."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRowError(f"{key} = {shown(text)}, contains a lone surrogate or bytes that are not UTF-8") from None


def validate_messages(value: object, max_bytes: float = math.inf) -> list[Message]:
    """Returns a conversation as messages with role and content. Raises InvalidRowError if `value` is not valid."""
    if value == NOT_UTF8:
        raise InvalidRowError(f"{MESSAGES} contains bytes that are not UTF-8")
    if not isinstance(value, list) or not value:
        raise InvalidRowError(f"{MESSAGES} = {shown(value)}, must be a non-empty list of role and content")
    messages, size = [], 0
    for i, item in enumerate(value):
        message = _message(item, key := f"{MESSAGES}[{i}]")
        messages.append(message)
        size += _num_bytes(message["content"], key)
    if not any(message["content"].strip() for message in messages):
        raise InvalidRowError(f"{MESSAGES} = {shown(messages)}, must hold more than white space")
    if size > max_bytes:
        raise InvalidRowError(f"{MESSAGES} = {shown(messages)}, has {size:,} bytes, must have at most {max_bytes:,}")
    return messages


def _message(value: object, key: str) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise InvalidRowError(f"{key} = {shown(value)}, must have role and content")
    role, content = _unicode(value["role"]), _unicode(value["content"])
    if role not in _ROLES:
        raise InvalidRowError(f"{key}.role = {shown(role)}, must be one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise InvalidRowError(f"{key}.content = {shown(content)}, must be a string")
    return {"role": role, "content": content}
