"""Checks that all of a model came from its files: nothing random, nothing left out, nothing read without its scale.

transformers fills a missing tensor with random numbers, skips one that it has no place for, and says so in a log at
most. What it reports of a load is held against the model here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

_REMEDY = "copy the model again"

# Tensors that old checkpoints carry and that models compute anew, or that belong to training.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
_ADAPTER = re.compile(r"\b(lora_|adapter_|prompt_embeddings|ia3_|base_layer\b)")
_SCALE = re.compile(r"((?<!logit)_scale(_inv|_2)?|\.scales|zero_point|qzeros|g_idx|absmax)$")


def check_shapes(report: Mapping[str, Any]) -> None:
    """Raises ValueError for a tensor of another shape than config.json says. `report` is as that of `check_load`."""
    for name, held, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"{name} has shape {tuple(held)}, must be {tuple(wanted)} by config.json: {_REMEDY}")


def check_load(report: Mapping[str, Any], model: nn.Module, backbone: nn.Module) -> None:
    """Raises ValueError unless the files gave `backbone`, a part of `model`, exactly the tensors that it has.

    `report` is what `from_pretrained(..., output_loading_info=True)` returns. Heads beside the backbone may be missing,
    and other parts, such as a vision tower, may be left over.
    """
    prefix = _prefix_of(backbone, model)
    left_over = [name for name in sorted(report["unexpected_keys"]) if not _COMPUTED.search(name)]
    _check_readable(left_over)
    missing = [name for name in sorted(report["missing_keys"]) if name.startswith(prefix)]
    if missing:
        renamed = next((name for name in left_over if name.endswith(missing[0])), None)
        remedy = f"the file calls it {renamed}: save the model without that prefix" if renamed else _REMEDY
        raise ValueError(f"{_named(missing)} is missing in the weights, though config.json asks for it: {remedy}")
    parts = {name for name, _ in backbone.named_children()}
    unused = [name for name in left_over if name.removeprefix(prefix).partition(".")[0] in parts]
    if unused:
        raise ValueError(f"{_named(unused)} is in the weights, but config.json has no place for it: {_REMEDY}")


def _check_readable(left_over: Collection[str]) -> None:
    adapters = [name for name in left_over if _ADAPTER.search(name)]
    if adapters:
        raise ValueError(f"{_named(adapters)} is part of an adapter: merge it into the weights and save them")
    scales = [name for name in left_over if _SCALE.search(name)]
    if scales:
        raise ValueError(
            f"{_named(scales)} is of a quantisation that transformers does not apply: give it the unquantised model"
        )


def _prefix_of(backbone: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is backbone)
    return f"{name}." if name else ""


def _named(names: Collection[str]) -> str:
    """The first of some tensors and how many there are."""
    first, *others = names
    return f"{first} (the first of {len(names)})" if others else first
