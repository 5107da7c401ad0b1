"""The files of a model's directory: which of them is damaged, where it cannot be loaded.

transformers often names neither the file nor the tensor. It is asked first; what is here looks for the reason.
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
_OBJECTS = ("config.json", "tokenizer.json", ".index.json")  # others may be lists
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_format(source: str, revision: str | None, config: Any) -> None:
    """Raises ValueError where transformers would load weights without what belongs to them: adapters, scales."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if _has(source, revision, "adapter_config.json"):
        raise ValueError("an adapter lies beside it (adapter_config.json): merge it into the weights and save them")
    quantisation = getattr(config.get_text_config(), "quantization_config", None) or {}
    quantisation = getattr(config, "quantization_config", None) or quantisation
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if _has(source, revision, "hf_quant_config.json") or (method and method not in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ValueError(
            f"it is quantised by {method or 'modelopt'}, whose scales transformers does not apply: "
            "give it the unquantised model"
        )
    if method == "fp8":
        _tell_inexact(source)


@cache
def _tell_inexact(source: str) -> None:
    """Says it once in a process."""
    say(f"encoder {source}: block FP8 rounds activations to 8 bits: they are 8 to 14 % off the unquantised model's")


def _has(source: str, revision: str | None, name: str) -> bool:
    from transformers.utils.hub import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, name, revision=revision, **quietly) is not None


def check_whole(folder: Path) -> None:
    """Raises ValueError where files of weights are missing or cut; of each the header alone is read."""
    for problem in _problems_of_weights(folder):
        raise ValueError(problem)


def check_json(folder: Path) -> None:
    """Raises ValueError where a config is no JSON, or does not say what it must."""
    for problem in _problems_of_json(folder):
        raise ValueError(problem)


def check_template(tokenizer: Any) -> None:
    """Raises ValueError where the chat template is none, or renders no end of text.

    Which messages it takes is seen when they come.
    """
    if tokenizer.chat_template is None:
        return
    try:
        chat_template.of_tokenizer(tokenizer).render([{"role": "user", "content": ""}], add_generation_prompt=False)
    except chat_template.TemplateError as error:
        if error.line is not None:
            raise ValueError(
                f"its chat template is broken in line {error.line} ({one_line(error)}): {_REMEDY}"
            ) from None
        if error.is_endless:
            raise ValueError(f"its chat template is not fit for use: {error}: choose another model") from None


def explained(source: Path, error: Exception) -> str:
    """Why a directory or a GGUF cannot be loaded, and the remedy: the first damaged file, or what the error says."""
    if source.is_file():
        return f"it is cut or damaged, or of a kind that is not read ({one_line(error)}): {_REMEDY}"
    problem = next(_problems(source), None) if source.is_dir() else None
    return one_line(error) if problem is None else f"{problem}: {_REMEDY}"


def _problems(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "it has no config.json and no .gguf file"
        return
    yield from _problems_of_json(folder)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        yield "it has no tokenizer.json"
    yield from _problems_of_weights(folder)
    yield from _problems_of_tokenizer(folder)


def _problems_of_json(folder: Path) -> Iterator[str]:
    from transformers import CONFIG_MAPPING, AutoConfig

    for path in sorted([*folder.glob("*.json"), *folder.glob("*/config.json")]):
        name = path.relative_to(folder)
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            yield f"{name} is not JSON ({one_line(error)})"
            continue
        if path.name.endswith(_OBJECTS) and not isinstance(content, dict):
            yield f"{name} holds no object"
    model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    if model_type is None:
        yield "config.json: model_type is missing"
    elif model_type not in CONFIG_MAPPING:
        yield f'config.json: model_type = "{model_type}" is not known (is it newer? upgrade transformers)'
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its validators raise what they like
        yield f"config.json: {one_line(error)}"


def _problems_of_weights(folder: Path) -> Iterator[str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield "it has no .safetensors file"
    for path in files:
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{path.name} is cut or damaged ({one_line(error)})"
    for path in sorted(folder.glob("*.safetensors.index.json")):
        files_of = json.loads(path.read_bytes()).get("weight_map")
        if not isinstance(files_of, dict):
            yield f"{path.name} has no weight_map"
            continue
        for name in sorted(set(files_of.values())):
            if not (folder / name).exists():
                yield f"{name} is missing, though {path.name} names it"


def _problems_of_tokenizer(folder: Path) -> Iterator[str]:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever its files hold
        yield f"its tokenizer cannot be read from tokenizer.json and tokenizer_config.json ({one_line(error)})"
