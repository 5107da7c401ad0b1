"""A router's estimates of each prompt of a log, stored by the prompt's content.

Estimates do not depend on pools, prices or budgets. An encoder reads each prompt once; targets can then be chosen
again for other settings.
"""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.common.schema import estimates as schema

Contents = NDArray[np.uint64]  # (N, 2): the content digest of each prompt


class PromptEstimates(NamedTuple):
    """Estimates of N prompts, with targets in the router's order. A prompt that could not be encoded has a reason."""

    contents: Contents
    input_tokens: NDArray[np.int32]  # (N,) before truncation
    is_truncated: NDArray[np.bool_]  # (N,)
    p_correct: NDArray[np.float32]  # (N, T)
    output_tokens: NDArray[np.float32]  # (N, T) expected
    percentile: NDArray[np.float32]  # (N,) share of training prompts that are nearer; NaN if unknown
    reasons: NDArray[Any]  # (N,) why the prompt could not be encoded, or None

    @classmethod
    def unread(cls, contents: Contents, num_targets: int) -> PromptEstimates:
        """Returns blank estimates to fill in."""
        shape = len(contents), num_targets
        return cls(
            contents=contents,
            input_tokens=np.zeros(shape[0], np.int32),
            is_truncated=np.zeros(shape[0], np.bool_),
            p_correct=np.zeros(shape, np.float32),
            output_tokens=np.zeros(shape, np.float32),
            percentile=np.full(shape[0], np.nan, np.float32),
            reasons=np.full(shape[0], None, object),
        )

    def take(self, rows: NDArray[Any]) -> PromptEstimates:
        return PromptEstimates(*(values[rows] for values in self))

    @classmethod
    def concatenate(cls, parts: Sequence[PromptEstimates]) -> PromptEstimates:
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def to_table(self) -> pa.Table:
        num_targets = self.p_correct.shape[1]

        def vectors(values: NDArray[np.float32]) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), num_targets)

        content = pa.array([row.tobytes() for row in self.contents], pa.binary(16))
        columns = [
            content,
            pa.array(self.input_tokens),
            pa.array(self.is_truncated),
            vectors(self.p_correct),
            vectors(self.output_tokens),
            pa.array(self.percentile, from_pandas=True),
            pa.array(self.reasons, pa.string()),
        ]
        wanted = schema(num_targets)
        return pa.table([a.cast(f.type) for a, f in zip(columns, wanted, strict=True)], schema=wanted)

    @classmethod
    def load(cls, uri: str, name: str) -> PromptEstimates:
        """Reads one object of a folder."""
        return cls.from_table(storage.read_table(storage.join(uri, name)))

    @classmethod
    def from_table(cls, table: pa.Table) -> PromptEstimates:
        arrays = [column.combine_chunks() for column in table.columns]
        content, input_tokens, is_truncated, p_correct, output_tokens, percentile, reasons = arrays
        num_targets = table.schema.field("p_correct").type.list_size
        return cls(
            contents=contents_of(content.to_pylist()),
            input_tokens=input_tokens.to_numpy(),
            is_truncated=is_truncated.to_numpy(zero_copy_only=False),
            p_correct=p_correct.flatten().to_numpy().reshape(-1, num_targets),
            output_tokens=output_tokens.flatten().to_numpy().reshape(-1, num_targets),
            percentile=percentile.to_numpy(zero_copy_only=False).astype(np.float32),
            reasons=np.array(reasons.to_pylist(), object),
        )


def contents_of(digests: Sequence[bytes]) -> Contents:
    """Converts content digests of 16 bytes to an array (N, 2)."""
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


class ContentIndex:
    """Looks up many contents at once among M known ones, by exact match."""

    def __init__(self, contents: Contents) -> None:
        self._order = np.lexsort((contents[:, 1], contents[:, 0]))
        self._first, self._second = contents[self._order].T

    def find(self, wanted: Contents) -> NDArray[np.int64]:
        """Returns the index (N,) of each of `wanted`, -1 if it is unknown."""
        if not len(self._first):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self._first, wanted[:, 0])
        last = len(self._first) - 1
        while True:  # skips others with the same first half
            at = np.minimum(places, last)
            agrees = (places <= last) & (self._first[at] == wanted[:, 0])
            is_other = agrees & (self._second[at] != wanted[:, 1])
            if not is_other.any():
                return np.where(agrees, self._order[at], -1)
            places = places + is_other
