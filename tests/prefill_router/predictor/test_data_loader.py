from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.predictor.counter_random import seed_keys
from prefill_router.predictor.data_loader import Rows, WorkerRows

KEYS = seed_keys([0, 1, 2])


def shard(index: int, num_rows: int) -> Rows:
    """Rows whose features are their shard and row number."""
    places = torch.tensor([[index, row] for row in range(num_rows)], dtype=torch.float32).view(-1, 2)
    keys = torch.arange(num_rows, dtype=torch.int32) + 1000 * index
    return Rows(places, places[:, :1], keys)


def feed(sizes: list[int], own: list[int] | None = None, window_rows: int = 1 << 16) -> WorkerRows:
    shards = range(len(sizes)) if own is None else own
    return WorkerRows(sizes, {i: shard(i, sizes[i]) for i in shards}, {}, shard(0, 0), window_rows=window_rows)


def batches(fed: WorkerRows, k: int, num_steps: int, epoch: int = 0) -> list[set[tuple[float, ...]]]:
    """Returns the (shard, row) pairs of each batch of seed k, window after window."""
    found = []
    for window in fed.windows(seed_keys([epoch])[0]):
        order, counts = window.batches(KEYS, num_steps)
        for rows in order[k].split(counts[k].tolist()):
            found.append({tuple(place) for place in window.rows.features[rows].tolist()})
    return found


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(10, 80))
def test_every_row_is_read_once_an_epoch(sizes: list[int], num_steps: int, window_rows: int) -> None:
    expected = {(float(i), float(row)) for i, size in enumerate(sizes) for row in range(size)}
    for k in range(3):
        read = batches(feed(sizes, window_rows=window_rows), k, num_steps)
        assert sum(map(len, read)) == len(expected)
        assert set().union(*read) == expected


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(10, 80), st.integers(1, 3))
def test_workers_share_the_batches_that_one_would_read(
    sizes: list[int], num_steps: int, window_rows: int, num_workers: int
) -> None:
    alone = batches(feed(sizes, window_rows=window_rows), 1, num_steps)
    own = [list(range(rank, len(sizes), num_workers)) for rank in range(num_workers)]
    shares = [batches(feed(sizes, shards, window_rows), 1, num_steps) for shards in own]
    together = [set().union(*parts) for parts in zip(*shares, strict=True)]
    assert together == alone


def test_batches_are_equally_large_to_a_few_rows() -> None:
    sizes = [len(batch) for batch in batches(feed([100] * 20), 0, num_steps=8)]
    assert sum(sizes) == 2000
    assert max(sizes) - min(sizes) <= 20


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    fed = feed([64, 64])
    first, other_seed = (batches(fed, k, num_steps=4) for k in (0, 1))
    assert first != other_seed
    window = next(fed.windows(seed_keys([0])[0]))
    again = window.batches(KEYS, 4)[0]
    assert torch.equal(again, window.batches(KEYS, 4)[0])
    assert not torch.equal(again, window.batches(KEYS + 1, 4)[0])


def test_windows_hold_no_more_rows_than_they_may() -> None:
    fed = feed([10] * 12, window_rows=35)
    sizes = [window.num_rows for window in fed.windows(seed_keys([3])[0])]
    assert sum(sizes) == 120
    assert max(sizes) <= 35
    orders = [[w.shards.tolist() for w in fed.windows(seed_keys([epoch])[0])] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_what_fits_into_one_window_is_loaded_once() -> None:
    fed = feed([5, 6])
    first, second = (next(fed.windows(seed_keys([epoch])[0])) for epoch in range(2))
    assert first is second


def test_a_worker_without_rows_has_empty_batches() -> None:
    window = next(feed([4, 0], own=[]).windows(seed_keys([0])[0]))
    order, counts = window.batches(KEYS, 3)
    assert order.shape == (3, 0)
    assert counts.tolist() == [[0] * 3] * 3
    assert window.num_rows == 4


@pytest.mark.parametrize("part", ["features", "keys"])
def test_rows_are_concatenated_in_order(part: str) -> None:
    whole = Rows.concatenate([shard(0, 2), shard(1, 3)])
    assert len(whole) == 5
    torch.testing.assert_close(getattr(whole, part), torch.cat([getattr(shard(i, i + 2), part) for i in (0, 1)]))
