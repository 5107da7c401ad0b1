"""Tiny random checkpoints, as transformers saves them, of weights with which every token matters to those after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from census.tiny_configs import tiny_config

# Kinds whose vision tower is timm's, which is not installed: what is saved are the weights of the language model, by
# this class, under the names that they have in the whole.
_TEXT_CLASSES = {"gemma3n": "Gemma3nForCausalLM", "fast_vlm": "Qwen2ForCausalLM", "perception_lm": "LlamaForCausalLM"}


def save_checkpoint(kind: str, class_name: str, folder: Path) -> None:
    """Saves a random model of `kind` into `folder`."""
    config = tiny_config(kind)
    if kind in _TEXT_CLASSES:
        _save_text_part(config, class_name, _TEXT_CLASSES[kind], folder)
        return
    model = _class(class_name)._from_config(config)
    _randomise(model)
    model.save_pretrained(folder)


def text_model(class_name: str, folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model of the checkpoint, to be given texts."""
    text = _text_folder(folder)
    if text.exists():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(text, dtype=dtype).eval()
    return _class(class_name).from_pretrained(folder, dtype=dtype).eval()


def _save_text_part(config: Any, class_name: str, text_class: str, folder: Path) -> None:
    model = _class(text_class)._from_config(config.text_config)
    _randomise(model)
    model.save_pretrained(_text_folder(folder))
    config.architectures = [class_name]
    config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.model.state_dict().items()}
    save_file({f"model.language_model.{name}": w for name, w in weights.items()}, folder / "model.safetensors")


def _text_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-text")


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Large weights, norms and biases that are not those of an untrained model.

    All are numbers of bfloat16, so that float32 and bfloat16 load the same ones.
    """
    for parameter in model.parameters():
        parameter.copy_(_random(parameter).bfloat16())


def _random(parameter: Tensor) -> Tensor:
    noise = torch.randn_like(parameter)
    if parameter.ndim > 1:
        return noise * min(0.2, parameter[0].numel() ** -0.5)
    return parameter + 0.1 * noise
