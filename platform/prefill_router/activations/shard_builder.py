"""A shard in the making: the rows that it is to hold, and what is known so far of their activations."""

# n rows, C columns, D hidden size

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.activations import commit_log
from prefill_router.activations.activation_store import from_table, to_table
from prefill_router.activations.commit_log import RecordLocation
from prefill_router.activations.commit_records import Commit, RejectedPrompt, shard_name
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.plan import Repeats, Shard, read_shard
from prefill_router.corpus.reader import Prompt
from prefill_router.corpus.row_keys import row_keys
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.storage import parquet_objects

_NOT_FINITE = "its activations are not finite: the encoder's dtype may be too narrow for it"


class Draft:
    """Make one with `of_shard` or `of_repeats`, fill it with `copy` and `fill`, and `commit` it."""

    def __init__(
        self, digest: str, prompt_ids: Sequence[str], contents: Sequence[str], columns: Sequence[ActivationColumn]
    ) -> None:
        self.prompt_ids, self.contents, self.columns = list(prompt_ids), list(contents), list(columns)
        self.names = [column.name for column in columns]
        self.name = shard_name(digest, self.names)
        self.prompts: list[Prompt] = []
        self.places: dict[int, tuple[str, int]] = {}  # of the rows: their files, and where they stand in them
        self.refused: dict[int, str] = {}  # rows that will not be in the shard, and why
        self.has_nC = np.zeros((len(prompt_ids), len(columns)), np.bool_)
        self.num_tokens = np.zeros(len(prompt_ids), np.int32)
        self.full_lengths = np.zeros(len(prompt_ids), np.int32)  # before any was cut; of one that was copied, after
        self.is_truncated = np.zeros(len(prompt_ids), np.bool_)
        self._values: dict[str, NDArray[np.float16]] = {}
        self._rows_of: dict[str, list[int]] = defaultdict(list)
        for row, content in enumerate(self.contents):
            self._rows_of[content].append(row)

    @classmethod
    def of_shard(cls, shard: Shard, columns: Sequence[ActivationColumn], max_prompt_bytes: int) -> Draft:
        rows = read_shard(shard, max_prompt_bytes)
        contents = [row.content_digest.hex() for row in rows]
        draft = cls(shard.digest, [row.prompt_id for row in rows], contents, columns)
        draft.prompts = [row.prompt for row in rows]
        draft.places = dict(enumerate(shard.places))
        return draft

    @classmethod
    def of_repeats(cls, repeats: Repeats, columns: Sequence[ActivationColumn]) -> Draft:
        return cls(repeats.digest, repeats.prompt_ids, repeats.contents, columns)

    @property
    def num_complete(self) -> int:
        return int(self.has_nC.all(1).sum())

    def missing(self) -> Iterator[tuple[list[int], list[ActivationColumn]]]:
        """Rows and the columns that they lack, rows that lack the same ones together."""
        for has_C in np.unique(self.has_nC, axis=0):
            rows = np.flatnonzero((self.has_nC == has_C).all(1)).tolist()
            rows = [row for row in rows if row not in self.refused]
            columns = [column for column, has in zip(self.columns, has_C, strict=True) if not has]
            if rows and columns:
                yield rows, columns

    def fill(self, rows: Sequence[int], reading: EncodedPrompts) -> None:
        """Takes what the encoder read of `rows`."""
        encoded = reading.encoded
        self._set(list(rows), encoded)
        self.full_lengths[list(rows)] = reading.full_lengths
        self.is_truncated[list(rows)] = reading.is_truncated
        columns = [values for name, values in encoded.items() if name != NUM_TOKENS]
        is_finite = np.all([np.isfinite(values).all(1) for values in columns], axis=0)
        self.refused.update({row: _NOT_FINITE for row, fine in zip(rows, is_finite, strict=True) if not fine})

    def copy(self, out: str, source: RecordLocation) -> None:
        """Takes over, bit for bit, what a finished shard holds of these prompts."""
        record = commit_log.read(out, source)
        if not self.prompts:  # then what the source could not read can't be read here
            self._copy_refusals(record)
        pairs = [(i, row) for i, content in enumerate(record.contents) for row in self._rows_of.get(content, ())]
        shared = [name for name in self.names if name in record.columns]
        if record.file is None or not pairs or not shared:
            return
        theirs, ours = (list(rows) for rows in zip(*pairs, strict=True))
        encoded = from_table(parquet_objects.read_shard(out, record.file, [*shared, NUM_TOKENS]))
        self._set(ours, {name: values[theirs] for name, values in encoded.items()})
        self.is_truncated[ours] = np.isin(theirs, record.truncated)

    def activations(self, rows: Sequence[int]) -> dict[str, NDArray[np.float16]]:
        """What is known of `rows`, (len(rows), D) of each column."""
        return {name: self._values[name][rows] for name in self.names}

    def commit(self, out: str) -> Commit:
        """Writes the object and enters it in the ledger."""
        kept = [row for row in range(len(self.prompt_ids)) if row not in self.refused]
        assert self.has_nC[kept].all(), "a row would be written that was not computed"
        prompt_ids = [self.prompt_ids[row] for row in kept]
        table = to_table(prompt_ids, {**self.activations(kept), NUM_TOKENS: self.num_tokens[kept]}) if kept else None
        record = Commit(
            name=self.name,
            file=None if table is None else parquet_objects.create_shard(out, self.name, table),
            columns=self.names,
            num_tokens=int(self.num_tokens[kept].sum()),
            truncated=np.flatnonzero(self.is_truncated[kept]).tolist(),
            keys=Commit.encode_keys(row_keys(prompt_ids, (self.contents[row] for row in kept))),
            refused=[self._refusal(row, reason) for row, reason in sorted(self.refused.items())],
        )
        return commit_log.commit(out, record)

    def _set(self, rows: list[int], encoded: dict[str, NDArray[Any]]) -> None:
        for name, values in encoded.items():
            if name == NUM_TOKENS:
                self.num_tokens[rows] = self.full_lengths[rows] = values
                continue
            if name not in self._values:
                self._values[name] = np.zeros((len(self.prompt_ids), values.shape[1]), np.float16)
            self._values[name][rows] = values
            self.has_nC[rows, self.names.index(name)] = True

    def _copy_refusals(self, record: Commit) -> None:
        for refused in record.refused:
            for row in self._rows_of.get(refused.content, ()):
                self.refused[row] = refused.reason
                self.places[row] = (refused.uri, refused.row)

    def _refusal(self, row: int, reason: str) -> RejectedPrompt:
        uri, place = self.places[row]
        content = self.contents[row]
        return RejectedPrompt(uri=uri, row=place, prompt_id=self.prompt_ids[row], content=content, reason=reason)
