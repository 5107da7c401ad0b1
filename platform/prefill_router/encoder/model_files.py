"""Checks the files of a model directory, and finds the damaged file when transformers fails to load it.

transformers' own errors often name neither the file nor the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prefill_router.common.console import say
from prefill_router.common.errors import one_line
from prefill_router.encoder import chat_template

_REMEDY = "copy the model again"
_OBJECTS = ("config.json", "tokenizer.json", ".index.json")  # other JSON files may be lists
_DATA_LIST = "data_config.json"  # the training data of a sentence encoder
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_format(source: str, revision: str | None, config: Any) -> None:
    """Raises ValueError if transformers would ignore a part of the weights: an adapter, or quantisation scales."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if _has(source, revision, "adapter_config.json"):
        raise ValueError("it contains an adapter (adapter_config.json): merge it into the weights and save them")
    quantisation = getattr(config.get_text_config(), "quantization_config", None) or {}
    quantisation = getattr(config, "quantization_config", None) or quantisation
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if _has(source, revision, "hf_quant_config.json") or (method and method not in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ValueError(
            f"it is quantised by {method or 'modelopt'}, whose scales transformers does not apply: "
            "use the unquantised model"
        )
    if method == "fp8":
        _warn_inexact(source)


@cache
def _warn_inexact(source: str) -> None:
    """Warns about FP8 once per process."""
    say(
        f"encoder {source}: block FP8 rounds activations to 8 bits: they differ by 8 to 14 % from the unquantised model"
    )


def _has(source: str, revision: str | None, name: str) -> bool:
    from transformers.utils.hub import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, name, revision=revision, **quietly) is not None


def check_weight_files(folder: Path) -> None:
    """Raises ValueError if weight files are missing or truncated. Reads their headers only."""
    for problem in _weight_problems(folder):
        raise ValueError(problem)


def check_json(folder: Path) -> None:
    """Raises ValueError if a JSON file is malformed or config.json is invalid."""
    for problem in _json_problems(folder):
        raise ValueError(problem)


def check_template(tokenizer: Any) -> None:
    """Raises ValueError if the chat template has a syntax error or exceeds its limits on an empty message.

    Other errors are ignored: a template may reject some messages and accept others.
    """
    if tokenizer.chat_template is None:
        return
    try:
        chat_template.template_of(tokenizer).render([{"role": "user", "content": ""}], add_generation_prompt=False)
    except chat_template.TemplateError as error:
        if error.line is not None:
            raise ValueError(
                f"its chat template has a syntax error in line {error.line} ({one_line(error)}): {_REMEDY}"
            ) from None
        if error.exceeds_limits:
            raise ValueError(f"its chat template is unusable: {error}: choose another model") from None


def explain(source: Path, error: Exception) -> str:
    """Returns why a directory or GGUF cannot be loaded, with the remedy: its first damaged file, or `error`'s text."""
    if source.is_file():
        return f"it is truncated or damaged, or of an unsupported format ({one_line(error)}): {_REMEDY}"
    problem = next(_problems(source), None) if source.is_dir() else None
    return one_line(error) if problem is None else f"{problem}: {_REMEDY}"


def _problems(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "it has no config.json and no .gguf file"
        return
    yield from _json_problems(folder)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        yield "it has no tokenizer.json"
    yield from _weight_problems(folder)
    yield from _tokenizer_problems(folder)


def _json_problems(folder: Path) -> Iterator[str]:
    from transformers import CONFIG_MAPPING, AutoConfig

    for path in sorted([*folder.glob("*.json"), *folder.glob("*/config.json")]):
        name = path.relative_to(folder)
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            yield f"{name} is not JSON ({one_line(error)})"
            continue
        if path.name.endswith(_OBJECTS) and path.name != _DATA_LIST and not isinstance(content, dict):
            yield f"{name} must be a JSON object"
    model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    if model_type is None:
        yield "config.json: model_type is missing"
    elif model_type not in CONFIG_MAPPING:
        yield f'config.json: model_type = "{model_type}" is unknown (if the model is newer, upgrade transformers)'
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # config classes can raise any exception
        yield f"config.json: {one_line(error)}"


def _weight_problems(folder: Path) -> Iterator[str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield "it has no .safetensors file"
    for path in files:
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{path.name} is truncated or damaged ({one_line(error)})"
    for path in sorted(folder.glob("*.safetensors.index.json")):
        files_of = json.loads(path.read_bytes()).get("weight_map")
        if not isinstance(files_of, dict):
            yield f"{path.name} has no weight_map"
            continue
        for name in sorted(set(files_of.values())):
            if not (folder / name).exists():
                yield f"{name} is missing, but listed in {path.name}"


def _tokenizer_problems(folder: Path) -> Iterator[str]:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # malformed files can raise any exception
        yield f"its tokenizer cannot be read from tokenizer.json and tokenizer_config.json ({one_line(error)})"
