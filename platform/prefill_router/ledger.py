"""The ledger of an extraction: a record for each shard that is done. What it names is never computed again.

Shards are named by what they hold, and both objects and records are only ever created, never changed. So a restart
redoes nothing, a corpus that grew or layers that were added cost what is new, and two writers cannot harm each other.
Readers do not come here: they trust the manifest, which is written when all is done.
"""

# n rows of a shard

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from prefill_router import config, shards, storage
from prefill_router.corpus import BadRow
from prefill_router.encoder import EncoderIdentity
from prefill_router.errors import UserError
from prefill_router.features import ActivationShard
from prefill_router.plan import Keys

_COMMITS = "commits"
_ENCODER = "encoder.json"


class Refused(config.StrictModel):
    """A row that the encoder could not read, with the digest of its prompt."""

    uri: str
    row: int
    prompt_id: str
    content: str
    reason: str

    def to_bad_row(self) -> BadRow:
        return BadRow(self.uri, self.row, self.prompt_id, self.reason)


class Commit(config.StrictModel):
    """One shard that is done: its object, and which rows that holds."""

    name: str
    file: shards.ShardFile | None  # None where no row could be read
    columns: list[str]
    num_tokens: int
    truncated: list[int]  # rows, counted in the shard
    keys: str  # base64 of (n, 3) uint64, as `plan.row_keys` gives them
    refused: list[Refused]

    @property
    def row_keys(self) -> Keys:
        return np.frombuffer(base64.b64decode(self.keys), "<u8").reshape(-1, 3)

    @staticmethod
    def encode_keys(keys: Keys) -> str:
        return base64.b64encode(keys.tobytes()).decode()

    @property
    def contents(self) -> list[str]:
        """The digest of each row's prompt, in hex."""
        return [key.tobytes().hex() for key in np.ascontiguousarray(self.row_keys[:, 1:])]

    @property
    def shard(self) -> ActivationShard:
        assert self.file is not None
        return ActivationShard(file=self.file, num_tokens=self.num_tokens, num_truncated=len(self.truncated))


def shard_name(digest: str, columns: Iterable[str]) -> str:
    """The name of a shard: of its rows, by the plan's digest of them, and its columns."""
    return hashlib.sha256("\n".join([digest, *columns]).encode()).hexdigest()[:32]


class Ledger:
    """The records at an output, as they were when it was opened."""

    def __init__(self, uri: str, encoder: EncoderIdentity | None, commits: dict[str, Commit]) -> None:
        self.uri, self.encoder, self.commits = uri, encoder, commits

    @classmethod
    def open(cls, uri: str) -> Ledger:
        folder = storage.join(uri, _COMMITS)
        paths = [storage.join(folder, name) for name in storage.list_names(folder) if name.endswith(".json")]
        commits = (_parse(data, path) for data, path in zip(storage.read_many(paths), paths, strict=True))
        path = storage.join(uri, _ENCODER)
        encoder = config.validate(EncoderIdentity, storage.read_json(path), path) if storage.exists(path) else None
        return cls(uri, encoder, {commit.name: commit for commit in commits})

    def sources(self, keys: Keys) -> list[str]:
        """The shards that seem to hold prompts of `keys`, under whatever id: 64 bits of a prompt are compared."""
        contents, owners = self._contents
        starts, ends = (np.searchsorted(contents, keys[:, 1], side) for side in ("left", "right"))
        is_held = starts < ends
        held = (owners[a:b] for a, b in zip(starts[is_held], ends[is_held], strict=True))
        names = list(self.commits)
        return [names[i] for i in np.unique(np.concatenate([np.zeros(0, np.int64), *held]))]

    @cached_property
    def _contents(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """64 bits of each prompt, sorted, and the position of the shard that holds it."""
        parts = [commit.row_keys[:, 1] for commit in self.commits.values()]
        contents = np.concatenate([np.zeros(0, np.uint64), *parts])
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        order = np.argsort(contents, kind="stable")
        return contents[order], owners[order]


def _parse(data: bytes, path: str) -> Commit:
    try:
        return Commit.model_validate_json(data)
    except ValidationError:
        raise UserError(f"{path}: is no record of a shard: remove it, and that shard is computed again") from None


def find(uri: str, name: str) -> Commit | None:
    """The record of one shard, where it is done."""
    path = _commit_path(uri, name)
    try:
        return _parse(storage.read_bytes(path), path)
    except FileNotFoundError:
        return None


def commit(uri: str, record: Commit) -> Commit:
    """Enters a shard whose object lies whole. Where another was faster, its record stands and is returned."""
    path = _commit_path(uri, record.name)
    if storage.create_bytes(path, record.model_dump_json().encode()):
        return record
    return _parse(storage.read_bytes(path), path)


def claim_encoder(uri: str, identity: EncoderIdentity) -> None:
    """Makes the output that of one encoder. Raises UserError where it is another's."""
    path = storage.join(uri, _ENCODER)
    if storage.create_bytes(path, identity.model_dump_json().encode()):
        return
    stored = config.validate(EncoderIdentity, storage.read_json(path), path)
    if stored.fingerprint != identity.fingerprint:
        raise UserError(
            f"{uri}: holds activations of another encoder ({stored.spec.model}, or the same with other weights, "
            "tokenizer, dtype or settings): choose another --out, or replace it with --overwrite"
        )


def clear(uri: str) -> None:
    """Deletes an extraction, its manifest first, and nothing that is not ours."""
    storage.remove(storage.join(uri, shards.MANIFEST))
    storage.remove(storage.join(uri, _COMMITS))
    storage.remove(storage.join(uri, _ENCODER))
    shards.remove_shards(uri)


def tidy(uri: str, keep: Sequence[Commit]) -> None:
    """Removes the records and objects that a finished store does not need: its readers do not know of them."""
    names = {record.name for record in keep}
    folder = storage.join(uri, _COMMITS)
    for file in storage.list_names(folder):
        if file.removesuffix(".json") not in names:
            storage.remove(storage.join(folder, file))
    shards.remove_shards(uri, keep={record.file.name for record in keep if record.file})


def _commit_path(uri: str, name: str) -> str:
    return storage.join(uri, _COMMITS, f"{name}.json")
