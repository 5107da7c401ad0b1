"""Stores of different encoders, joined by prompt."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prefill_router.activations.activation_store import ActivationStore, StoreManifest, write_manifest
from prefill_router.activations.joined_stores import JoinedStores, join, open_stores, store_uris
from prefill_router.activations.shard_builder import ShardBuilder
from prefill_router.activations.shard_list import ActivationShard, ShardList
from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, ActivationColumn
from prefill_router.corpus.plan import Repeats
from prefill_router.corpus.reader import content_hash
from prefill_router.corpus.row_keys import digest_of, row_keys
from prefill_router.corpus.split import prompt_hashes
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.prefill_encoder import EncodedPrompts
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.sensors import named
from prefill_router.storage.lease import Lease

LAST, SENTENCE = ActivationColumn("last", 1), ActivationColumn("sentence", 2)
IDS = [f"p{i:02d}" for i in range(23)]


def identity(model: str, column: ActivationColumn = LAST) -> EncoderIdentity:
    width = 4 if column == LAST else 6
    return EncoderIdentity(spec=EncoderSpec(model=model), num_layers=2, hidden_size=width, fingerprint=f"f-{model}")


def value(model: str, prompt_id: str) -> float:
    """What every dimension of a prompt has in the store of a model."""
    return zlib.crc32(f"{model} {prompt_id}".encode()) % 997


def put(
    out: Path, model: str, ids: Sequence[str], shard_rows: int, column: ActivationColumn = LAST, changed: str = ""
) -> ActivationStore:
    """Writes a store as `extract` does. The prompt of the id `changed` is another one than elsewhere."""
    encoder, shards = identity(model, column), []
    for part in (ids[start : start + shard_rows] for start in range(0, len(ids), shard_rows)):
        contents = [content_hash(f"{i} again" if i == changed else i) for i in part]
        repeats = Repeats(tuple(part), tuple(contents), (), digest_of(row_keys(part, contents)))
        builder = ShardBuilder.of_repeats(repeats, [column])
        lengths = np.array([len(model) + int(i[1:]) for i in part], np.int32)
        values = np.repeat([[value(model, i)] for i in part], encoder.hidden_size, 1).astype(np.float16)
        builder.fill(range(len(part)), EncodedPrompts({column.name: values, NUM_TOKENS: lengths}, Work(), lengths))
        record = builder.commit(str(out))
        assert record.file is not None
        shards.append(ActivationShard(file=record.file, num_tokens=record.num_tokens, num_truncated=0))
    columns, listed = [column.name], ShardList.of(shards)
    manifest = StoreManifest(encoder=encoder, columns=columns, corpus="c.jsonl", is_sample=False, shards=listed)
    write_manifest(str(out), manifest)
    return ActivationStore(str(out), manifest)


def assert_holds(joined: JoinedStores, ids: Sequence[str], models: dict[str, str]) -> None:
    """The joined rows are those of `ids`, in this order, with the values of each model under its name."""
    found = []
    for shard in range(joined.num_shards):
        ids_here, encoded = joined.read(shard, joined.columns)
        found += ids_here.to_pylist()
        for column in joined.columns:
            expected = [value(models[column.encoder], i) for i in ids_here.to_pylist()]
            np.testing.assert_array_equal(
                encoded[column.name], np.float16(expected)[:, None] + 0 * encoded[column.name]
            )
        first = models[next(iter(joined.stores))]
        np.testing.assert_array_equal(encoded[NUM_TOKENS], [len(first) + int(i[1:]) for i in ids_here.to_pylist()])
    assert found == list(ids)


def test_shards_need_not_match(tmp_path: Path) -> None:
    """The stores differ in the number of rows per shard and in the order of the corpus."""
    stores = [put(tmp_path / "a", "org/one", IDS, 5), put(tmp_path / "b", "two", IDS[::-1], 7, SENTENCE)]
    joined, keys = join(stores)
    assert [column.name for column in joined.columns] == ["one:last_001", "two:sentence_002"]
    assert_holds(joined, IDS, {"one": "org/one", "two": "two"})
    np.testing.assert_array_equal(keys.prompts, prompt_hashes(IDS))
    assert not joined.is_sample
    joined, keys = join(stores[::-1])
    assert_holds(joined, IDS[::-1], {"one": "org/one", "two": "two"})
    np.testing.assert_array_equal(keys.prompts, prompt_hashes(IDS[::-1]))


def test_prompts_that_a_store_lacks_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a", "one", IDS[:20], 5)
    put(tmp_path / "b", "two", IDS[3:], 4, changed="p10")
    joined, keys = open_stores(str(tmp_path))
    assert isinstance(joined, JoinedStores)
    kept = [i for i in IDS[3:20] if i != "p10"]  # its content differs
    assert_holds(joined, kept, {"one": "one", "two": "two"})
    assert len(keys.prompts) == len(keys.contents) == 16
    assert joined.is_sample
    err = capsys.readouterr().err
    assert f"{tmp_path}/a: 4 prompts are left out, because another encoder's store lacks them" in err
    assert f"{tmp_path}/b: 4 prompts are left out" in err


def test_encoders_are_taken_by_fingerprint_under_other_names_in_another_order(tmp_path: Path) -> None:
    models = ("one", "two", "three")
    for i, model in enumerate(models):
        put(tmp_path / model, model, IDS[i:], 4 + i)
    joined, _ = open_stores(",".join(str(tmp_path / model) for model in models))
    chosen = joined.of({"x": identity("three"), "y": identity("one")})
    assert [column.name for column in chosen.columns] == ["x:last_001", "y:last_001"]
    assert_holds(chosen, IDS[2:], {"x": "three", "y": "one"})
    alone = joined.of({"": identity("two")})
    assert [column.name for column in alone.columns] == ["last_001"]
    assert_holds(alone, IDS[2:], {"": "two"})
    with pytest.raises(UserError, match=r"has no activations of encoder four \(fingerprint f-four\): add the store"):
        joined.of({"": identity("four")})


def test_stores_that_cannot_be_joined_are_refused(tmp_path: Path) -> None:
    one = put(tmp_path / "a", "one", IDS[:5], 5)
    with pytest.raises(UserError, match=r"2 stores are of one encoder \(f-one\): give one store per encoder"):
        join([one, put(tmp_path / "b", "one", IDS, 9)])
    with pytest.raises(UserError, match="the stores share no prompt: extract one corpus with every encoder"):
        join([one, put(tmp_path / "c", "two", IDS[5:], 9)])


def test_a_folder_with_an_unfinished_store_is_not_read_without_it(tmp_path: Path) -> None:
    put(tmp_path / "a", "one", IDS, 5)
    (tmp_path / "quarantine").mkdir()
    assert store_uris(str(tmp_path)) == [f"{tmp_path}/a"]
    Lease.acquire(str(tmp_path / "b"), "extract").release()  # an extraction that ended before its manifest
    with pytest.raises(UserError, match=f"{tmp_path}/b: no finished extraction here"):
        open_stores(str(tmp_path))


def test_encoders_of_one_name_are_numbered() -> None:
    models = ["a/m", "b/m", "m-2", "package:n", "/data/m/"]
    encoders = named(EncoderSpec(model=model) for model in models)
    assert {name: spec.model for name, spec in encoders.items()} == dict(
        zip(["m", "m-2", "m-2-2", "n", "m-3"], models, strict=True)
    )
    assert list(named([EncoderSpec(model="a/m")])) == [""]
