from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.query_log.estimates import ContentIndex, PromptEstimates, contents_of

HALVES = st.integers(0, 3)  # few values, so that many contents agree in one half and some in both
CONTENTS = st.lists(st.tuples(HALVES, HALVES), max_size=30)


def as_array(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.uint64).reshape(-1, 2)


@given(CONTENTS, CONTENTS)
def test_contents_are_found_exactly(known: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    places = ContentIndex(as_array(known)).find(as_array(wanted))
    for pair, place in zip(wanted, places, strict=True):
        assert (place == -1) == (pair not in known)
        assert place == -1 or known[place] == pair


def test_estimates_are_read_as_they_were_written() -> None:
    rng = np.random.default_rng(0)
    contents = contents_of([rng.bytes(16) for _ in range(5)])
    estimates = PromptEstimates.unread(contents, 3)
    estimates.input_tokens[:] = np.arange(5)
    estimates.p_correct[:] = rng.random((5, 3))
    estimates.output_tokens[:] = rng.random((5, 3)) * 100
    estimates.percentile[:3] = 0.5
    estimates.is_truncated[1] = True
    estimates.reasons[4] = "the chat template refuses it"
    sink = io.BytesIO()
    pq.write_table(estimates.to_table(), sink)
    read = PromptEstimates.from_table(pq.read_table(pa.BufferReader(sink.getvalue())))
    for ours, theirs in zip(estimates, read, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    both = PromptEstimates.concatenate([read, read.take(np.array([4, 0]))])
    assert both.reasons.tolist() == [None] * 4 + ["the chat template refuses it"] * 2 + [None]
