from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from command import Command
from prefill_jobs.extract import extract, parse_layers, parse_pooling
from prefill_router.config import ExtractConfig
from prefill_router.encoder import PrefillEncoder
from prefill_router.errors import UserError
from prefill_router.features import ActivationStore


def test_the_store_holds_what_the_encoder_returns(activations: str, small_data: Path, tiny_model: Path) -> None:
    store = ActivationStore.open(activations)
    corpus = pq.read_table(small_data / "corpus.parquet")
    encoder = PrefillEncoder.load(str(tiny_model))
    assert store.manifest.encoder == encoder.identity
    assert store.manifest.rows == len(corpus)
    assert store.prompt_ids().to_pylist() == corpus["prompt_id"].to_pylist()
    assert store.num_shards == 5
    for shard in range(store.num_shards):
        expected = encoder.encode(corpus["prompt"].slice(50 * shard, 50).to_pylist())
        _, stored = store.read(shard, store.columns)
        assert stored.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(stored[name], expected[name], atol=0.04)  # bfloat16, values up to 8


def test_only_the_layers_poolings_and_prompts_asked_for(
    local_ray: None, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    manifest = extract(
        ExtractConfig(
            corpus=str(small_data / "corpus.parquet"),
            encoder=str(tiny_model),
            layers="3, 1",
            pooling="mean",
            out=str(tmp_path / "out"),
            limit=7,
            max_tokens=6,
        )
    )
    assert manifest.columns == ["mean_001", "mean_003"]
    assert manifest.rows == 7
    assert manifest.is_sample
    assert manifest.encoder.spec.max_tokens == 6
    assert sum(shard.num_truncated for shard in manifest.shards) == 7


def test_repeated_prompts_without_ids_are_kept_and_said(
    local_ray: None, command: Command, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("prompt\none two\nthree four\none two\n")
    result = command("extract", corpus=corpus, encoder=tiny_model, layers="1", out=tmp_path / "out")
    assert result.status == 0
    assert "1 prompts repeat an earlier one" in result.err
    first, second, third = ActivationStore.open(str(tmp_path / "out")).prompt_ids().to_pylist()
    assert first == third != second


def test_two_actors_write_the_same_store(local_ray: None, small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    tables = []
    for workers in (1, 2):
        config = ExtractConfig(
            corpus=str(small_data / "corpus.parquet"),
            encoder=str(tiny_model),
            out=str(tmp_path / str(workers)),
            limit=60,
            shard_rows=20,
            workers=workers,
        )
        tables.append([shard.file.sha256 for shard in extract(config).shards])
    assert tables[0] == tables[1]


def test_a_failure_in_an_actor_is_the_users_error_and_leaves_no_manifest(
    local_ray: None, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = ExtractConfig(
        corpus=str(small_data / "corpus.parquet"), encoder=str(tiny_model), layers="9", out=str(tmp_path / "out")
    )
    with pytest.raises(UserError, match="layer 9 is out of range"):
        extract(config)
    with pytest.raises(UserError, match="no finished extraction"):
        ActivationStore.open(config.out)


def test_an_output_is_replaced_only_when_asked(
    local_ray: None, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = ExtractConfig(
        corpus=str(small_data / "corpus.parquet"),
        encoder=str(tiny_model),
        layers="1",
        out=str(tmp_path / "out"),
        limit=3,
    )
    extract(config)
    with pytest.raises(UserError, match="already holds"):
        extract(config)
    assert extract(config.model_copy(update={"overwrite": True, "limit": 2})).rows == 2


@pytest.mark.parametrize("text", ["1,x", "", "1;2"])
def test_layers_that_are_no_list_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["max", "last,first", ""])
def test_poolings_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be"):
        parse_pooling(text)
