from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from prefill_router.activations.shard_list import ActivationShard, ShardList
from prefill_router.storage.parquet_objects import ShardFile


def shard(i: int) -> ActivationShard:
    file = ShardFile(name=f"part-{i:06d}.parquet", rows=i, bytes=1000 * i, sha256=f"{i:064x}")
    return ActivationShard(file=file, num_tokens=20 * i, num_truncated=i % 2)


SHARDS = [shard(i) for i in range(5)]


class Model(BaseModel):
    shards: ShardList


def test_it_reads_as_a_sequence() -> None:
    listed = ShardList.of(SHARDS)
    assert len(listed) == 5
    assert list(listed) == SHARDS
    assert (listed[3], listed[-1]) == (SHARDS[3], SHARDS[4])
    assert list(listed[1:4:2]) == SHARDS[1:4:2]
    assert SHARDS[2] in listed
    with pytest.raises(IndexError):
        listed[5]


def test_totals_are_sums() -> None:
    assert ShardList.of(SHARDS).total("bytes") == sum(each.file.bytes for each in SHARDS)
    assert ShardList.of([]).total("rows") == 0


def test_equal_lists_are_equal() -> None:
    assert ShardList.of(SHARDS) == ShardList.of(SHARDS)
    assert hash(ShardList.of(SHARDS)) == hash(ShardList.of(SHARDS))
    assert ShardList.of(SHARDS) != ShardList.of(SHARDS[:4])
    assert ShardList.of(SHARDS) != SHARDS


def test_a_model_takes_and_dumps_a_list() -> None:
    model = Model(shards=SHARDS)
    assert model.model_dump() == {"shards": [each.model_dump() for each in SHARDS]}
    assert Model(**model.model_dump()) == Model.model_validate_json(model.model_dump_json()) == model
    assert Model(shards=model.shards).shards is model.shards
    with pytest.raises(ValidationError, match=r"shards\.1\.num_tokens"):
        Model(shards=[SHARDS[0], {**SHARDS[1].model_dump(), "num_tokens": "x"}])
