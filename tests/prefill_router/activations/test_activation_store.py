from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from prefill_router import storage
from prefill_router.activations import activation_store
from prefill_router.activations.activation_store import ActivationStore, StoreManifest, to_table, write_manifest
from prefill_router.activations.shard_list import ActivationShard
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.storage import parquet_objects

NAMES = ["last_001", "mean_001"]
LAST, MEAN = (ActivationColumn.parse(name) for name in NAMES)


def encoded(num_prompts: int, hidden_size: int = 8, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=(num_prompts, hidden_size)).astype(np.float16) for name in NAMES}
    return {**values, "num_tokens": rng.integers(1, 99, num_prompts).astype(np.int32)}


def write_activations(
    uri: str, index: int, prompt_ids: list[str], part: dict[str, NDArray[Any]], num_truncated: int
) -> ActivationShard:
    file = parquet_objects.write_shard(uri, index, to_table(prompt_ids, part))
    return ActivationShard(file=file, num_tokens=int(part["num_tokens"].sum()), num_truncated=num_truncated)


def write_store(uri: str, sizes: list[int]) -> list[dict[str, NDArray[Any]]]:
    """Writes a finished store with shards of these sizes; the ids are s0-0, s0-1, ..., s1-0, ..."""
    parts = [encoded(size, seed=i) for i, size in enumerate(sizes)]
    committed = [
        write_activations(uri, i, [f"s{i}-{row}" for row in range(sizes[i])], part, num_truncated=i)
        for i, part in enumerate(parts)
    ]
    identity = EncoderIdentity(spec=EncoderSpec(model="m"), num_layers=1, hidden_size=8, fingerprint="f")
    manifest = StoreManifest(encoder=identity, columns=NAMES, corpus="corpus.csv", is_sample=False, shards=committed)
    write_manifest(uri, manifest)
    return parts


def test_a_store_comes_back_shard_by_shard(root: str) -> None:
    parts = write_store(root, [3, 2])
    store = ActivationStore.open(root)
    assert (store.num_shards, store.manifest.rows) == (2, 5)
    assert store.columns == [LAST, MEAN]
    for index, part in enumerate(parts):
        ids, read = store.read(index, [MEAN, LAST])
        assert ids.to_pylist() == [f"s{index}-{row}" for row in range(len(ids))]
        assert list(read) == ["mean_001", "last_001", "num_tokens"]
        for name, values in read.items():
            assert values.dtype == part[name].dtype
            np.testing.assert_array_equal(values, part[name])


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    write_store(str(tmp_path), [3])
    _, read = ActivationStore.open(str(tmp_path)).read(0, [MEAN])
    assert list(read) == ["mean_001", "num_tokens"]


def test_prompt_ids_are_those_of_a_shard_or_of_all(tmp_path: Path) -> None:
    write_store(str(tmp_path), [2, 1])
    store = ActivationStore.open(str(tmp_path))
    assert store.prompt_ids().to_pylist() == ["s0-0", "s0-1", "s1-0"]
    assert store.prompt_ids(1).to_pylist() == ["s1-0"]


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 5), st.just(8))))
def test_activations_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, bits: NDArray[np.uint16]) -> None:
    """Including subnormals, infinities and negative zeros; a NaN may have other bits."""
    folder = str(tmp_path_factory.mktemp("store"))
    values = bits.view(np.float16)
    part: dict[str, NDArray[Any]] = {"last_001": values, "num_tokens": np.ones(len(values), np.int32)}
    shard = write_activations(folder, 0, [str(i) for i in range(len(values))], part, 0)
    table = storage.read_table(storage.join(folder, shard.file.name))
    read = table["last_001"].combine_chunks().flatten().to_numpy().reshape(values.shape)
    np.testing.assert_array_equal(read.view(np.uint16)[~np.isnan(values)], bits[~np.isnan(values)])
    np.testing.assert_array_equal(np.isnan(read), np.isnan(values))


def test_a_shard_says_what_the_encoder_saw(tmp_path: Path) -> None:
    part = encoded(4)
    shard = write_activations(str(tmp_path), 2, list("abcd"), part, num_truncated=3)
    assert (shard.num_tokens, shard.num_truncated) == (int(part["num_tokens"].sum()), 3)
    assert (shard.file.name, shard.file.rows) == ("part-000002.parquet", 4)


def test_duckdb_reads_the_shards_in_one_line(tmp_path: Path) -> None:
    parts = write_store(str(tmp_path), [3, 2])
    rows = duckdb.execute(
        f"select prompt_id, num_tokens, last_001[1], len(mean_001) from '{tmp_path}/part-*.parquet' order by 1"
    ).fetchall()
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ids = ["s0-0", "s0-1", "s0-2", "s1-0", "s1-1"]
    assert rows == [
        (i, int(n), float(v[0]), 8) for i, n, v in zip(ids, whole["num_tokens"], whole["last_001"], strict=True)
    ]


def test_vectors_are_a_standard_arrow_type(tmp_path: Path) -> None:
    write_store(str(tmp_path), [1])
    with storage.open_parquet(str(tmp_path / "part-000000.parquet")) as file:
        vector = file.schema_arrow.field("last_001").type
    assert pa.types.is_fixed_size_list(vector)
    assert not isinstance(vector, pa.BaseExtensionType)
    assert (vector.value_type, vector.list_size) == (pa.float16(), 8)


def test_a_store_without_manifest_is_unfinished(root: str) -> None:
    write_activations(root, 0, ["a"], encoded(1), 0)
    with pytest.raises(UserError, match=r"no finished extraction here \(manifest\.json is missing\): run extract"):
        ActivationStore.open(root)


def test_a_store_of_another_format_is_an_error(tmp_path: Path) -> None:
    write_store(str(tmp_path), [1])
    path = str(tmp_path / parquet_objects.MANIFEST)
    storage.write_json(path, {**storage.read_json(path), "format": 2})
    with pytest.raises(UserError, match=r"manifest\.json: format = 2, must be 1"):
        ActivationStore.open(str(tmp_path))


def test_a_long_list_of_shards_is_an_object_that_the_manifest_names(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "MAX_LISTED", 2)
    write_store(root, [1, 2, 3])
    listed = storage.read_json(storage.join(root, parquet_objects.MANIFEST))["shards"]
    store = ActivationStore.open(root)
    assert [shard.file.rows for shard in store.manifest.shards] == [1, 2, 3]
    assert store.prompt_ids(2).to_pylist() == ["s2-0", "s2-1", "s2-2"]
    assert storage.list_names(storage.join(root, "shards")) == [storage.name(listed["name"])]

    write_store(root, [1, 2, 4])
    assert storage.list_names(storage.join(root, "shards")) != [storage.name(listed["name"])]
    assert ActivationStore.open(root).manifest.rows == 7
    write_store(root, [5, 1])
    assert storage.list_names(storage.join(root, "shards")) == []
    assert ActivationStore.open(root).manifest.rows == 6


def test_a_long_list_within_a_manifest_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions wrote such manifests."""
    write_store(str(tmp_path), [1, 2, 3])
    monkeypatch.setattr(activation_store, "MAX_LISTED", 2)
    assert ActivationStore.open(str(tmp_path)).manifest.rows == 6


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_damaged_list_of_shards_is_one_line(root: str, damage: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "MAX_LISTED", 0)
    write_store(root, [1])
    (name,) = storage.list_names(storage.join(root, "shards"))
    path = storage.join(root, "shards", name)
    storage.remove(path)
    expected = "no such list of shards, though manifest.json names it"
    if damage is not None:
        storage.write_bytes(path, damage)
        expected = f"its checksum is not the one in manifest.json: remove {root} and write it again"
    with pytest.raises(UserError) as error:
        ActivationStore.open(root)
    assert str(error.value) == f"{path}: {expected}"


def test_a_shard_that_is_gone_is_an_error(tmp_path: Path) -> None:
    write_store(str(tmp_path), [1, 1])
    (tmp_path / "part-000001.parquet").unlink()
    store = ActivationStore.open(str(tmp_path))
    store.read(0, [LAST])
    with pytest.raises(UserError, match=r"part-000001\.parquet: no such shard, though manifest\.json names it"):
        store.read(1, [LAST])


def test_a_shard_with_other_rows_is_an_error(tmp_path: Path) -> None:
    write_store(str(tmp_path), [2])
    write_activations(str(tmp_path), 0, ["a"], encoded(1), 0)
    with pytest.raises(UserError, match=r"part-000000\.parquet: .* manifest\.json: remove .* and write it again"):
        ActivationStore.open(str(tmp_path)).read(0, [LAST])


def test_a_shard_that_lacks_a_column_is_an_error(tmp_path: Path) -> None:
    write_store(str(tmp_path), [2])
    part = encoded(2)
    del part["last_001"]
    write_activations(str(tmp_path), 0, ["a", "b"], part, 0)
    with pytest.raises(UserError, match=r"part-000000\.parquet: "):
        ActivationStore.open(str(tmp_path)).read(0, [LAST])


def test_a_column_that_was_not_extracted_is_an_error(tmp_path: Path) -> None:
    write_store(str(tmp_path), [1])
    with pytest.raises(UserError, match="has no column last_007: extract that layer and pooling too"):
        ActivationStore.open(str(tmp_path)).read(0, [LAST, ActivationColumn("last", 7)])
