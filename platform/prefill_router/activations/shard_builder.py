"""Builds one activation shard from copied and newly encoded rows, and commits it."""

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

NOT_FINITE = "its activations are not finite: the encoder's dtype may be too narrow for it"


class ShardBuilder:
    """Collects the activations of a shard's rows.

    Create it with `of_shard` or `of_repeats`, add activations with `copy` and `fill`, then `commit` it.
    """

    def __init__(
        self, digest: str, prompt_ids: Sequence[str], contents: Sequence[str], columns: Sequence[ActivationColumn]
    ) -> None:
        self.prompt_ids, self.contents, self.columns = list(prompt_ids), list(contents), list(columns)
        self.names = [column.name for column in columns]
        self.name = shard_name(digest, self.names)
        self.prompts: list[Prompt] = []
        self.places: dict[int, tuple[str, int]] = {}  # the file and the row number of each row
        self.refused: dict[int, str] = {}  # rows that the shard will not have, with the reasons
        self.has_nC = np.zeros((len(prompt_ids), len(columns)), np.bool_)
        self.num_tokens = np.zeros(len(prompt_ids), np.int32)
        self.full_lengths = np.zeros(len(prompt_ids), np.int32)  # before truncation; for copied rows, after it
        self.is_truncated = np.zeros(len(prompt_ids), np.bool_)
        self._values: dict[str, NDArray[np.float16]] = {}
        self._rows_of: dict[str, list[int]] = defaultdict(list)
        for row, content in enumerate(self.contents):
            self._rows_of[content].append(row)

    @classmethod
    def of_shard(cls, shard: Shard, columns: Sequence[ActivationColumn], max_prompt_bytes: int) -> ShardBuilder:
        """Reads the rows of a planned shard from the corpus."""
        rows = read_shard(shard, max_prompt_bytes)
        contents = [row.content_digest.hex() for row in rows]
        builder = cls(shard.digest, [row.prompt_id for row in rows], contents, columns)
        builder.prompts = [row.prompt for row in rows]
        builder.places = dict(enumerate(shard.places))
        return builder

    @classmethod
    def of_repeats(cls, repeats: Repeats, columns: Sequence[ActivationColumn]) -> ShardBuilder:
        """Takes repeated rows, whose activations can all be copied."""
        return cls(repeats.digest, repeats.prompt_ids, repeats.contents, columns)

    @property
    def num_complete(self) -> int:
        return int(self.has_nC.all(1).sum())

    def missing(self) -> Iterator[tuple[list[int], list[ActivationColumn]]]:
        """Yields rows with the columns that they lack, grouped by those columns."""
        for has_C in np.unique(self.has_nC, axis=0):
            rows = np.flatnonzero((self.has_nC == has_C).all(1)).tolist()
            rows = [row for row in rows if row not in self.refused]
            columns = [column for column, has in zip(self.columns, has_C, strict=True) if not has]
            if rows and columns:
                yield rows, columns

    def fill(self, rows: Sequence[int], reading: EncodedPrompts) -> None:
        """Adds the encoder's result for `rows`; refuses rows whose activations are not finite."""
        encoded = reading.encoded
        self._set(list(rows), encoded)
        self.full_lengths[list(rows)] = reading.full_lengths
        self.is_truncated[list(rows)] = reading.is_truncated
        columns = [values for name, values in encoded.items() if name != NUM_TOKENS]
        is_finite = np.all([np.isfinite(values).all(1) for values in columns], axis=0)
        self.refused.update({row: NOT_FINITE for row, fine in zip(rows, is_finite, strict=True) if not fine})

    def copy(self, out: str, source: RecordLocation) -> None:
        """Copies the activations of these prompts from a committed shard of the store `out`, bit for bit."""
        record = commit_log.read(out, source)
        if not self.prompts:  # without prompts, rows that failed in the source cannot be encoded here
            self._copy_refusals(record)
        pairs = [(i, row) for i, content in enumerate(record.contents) for row in self._rows_of.get(content, ())]
        shared = [name for name in self.names if name in record.columns]
        if record.file is None or not pairs or not shared:
            return
        source_rows, rows = (list(side) for side in zip(*pairs, strict=True))
        encoded = from_table(parquet_objects.read_shard(out, record.file, [*shared, NUM_TOKENS]))
        self._set(rows, {name: values[source_rows] for name, values in encoded.items()})
        self.is_truncated[rows] = np.isin(source_rows, record.truncated)

    def activations(self, rows: Sequence[int]) -> dict[str, NDArray[np.float16]]:
        """The activations of `rows`, (len(rows), D) for each column."""
        return {name: self._values[name][rows] for name in self.names}

    def commit(self, out: str) -> Commit:
        """Writes the shard's file and commits it in the log of `out`."""
        kept = [row for row in range(len(self.prompt_ids)) if row not in self.refused]
        assert self.has_nC[kept].all(), "a row that was not computed would be written"
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
        uri, row_in_file = self.places[row]
        content = self.contents[row]
        return RejectedPrompt(uri=uri, row=row_in_file, prompt_id=self.prompt_ids[row], content=content, reason=reason)
