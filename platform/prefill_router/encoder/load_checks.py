"""Checks that a model was loaded completely: no random or skipped tensors, no quantised weights without their scales.

transformers initialises missing tensors randomly and skips unexpected ones, with a log line at most. These checks
compare its loading report with the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

_REMEDY = "copy the model again"

# Tensors in old checkpoints that models now compute themselves.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
_ADAPTER = re.compile(r"\b(lora_|adapter_|prompt_embeddings|ia3_|base_layer\b)")
_SCALE = re.compile(r"((?<!logit)_scale(_inv|_2)?|\.scales|zero_point|qzeros|g_idx|absmax)$")


def check_shapes(report: Mapping[str, Any]) -> None:
    """Raises ValueError for a tensor whose shape differs from config.json. `report` is that of `check_load`."""
    for name, actual, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"{name} has shape {tuple(actual)}, must be {tuple(expected)} by config.json: {_REMEDY}")


def check_load(report: Mapping[str, Any], model: nn.Module, backbone: nn.Module) -> None:
    """Raises ValueError unless the files contain exactly the tensors of `backbone`, a part of `model`.

    `report` is what `from_pretrained(..., output_loading_info=True)` returns. Heads outside the backbone may be
    missing, and unused parts, such as a vision tower, may be present.
    """
    prefix = _prefix_of(backbone, model)
    unexpected = [name for name in sorted(report["unexpected_keys"]) if not _COMPUTED.search(name)]
    _check_readable(unexpected)
    missing = [name for name in sorted(report["missing_keys"]) if name.startswith(prefix)]
    if missing:
        renamed = next((name for name in unexpected if name.endswith(missing[0])), None)
        remedy = f"the file names it {renamed}: save the model without that prefix" if renamed else _REMEDY
        raise ValueError(f"{_summary(missing)} is missing in the weights, but config.json requires it: {remedy}")
    parts = {name for name, _ in backbone.named_children()}
    unused = [name for name in unexpected if name.removeprefix(prefix).partition(".")[0] in parts]
    if unused:
        raise ValueError(f"{_summary(unused)} is in the weights, but not in the model of config.json: {_REMEDY}")


def _check_readable(unexpected: Collection[str]) -> None:
    """Raises ValueError for tensors of adapters and of unsupported quantisation."""
    adapters = [name for name in unexpected if _ADAPTER.search(name)]
    if adapters:
        raise ValueError(f"{_summary(adapters)} is part of an adapter: merge it into the weights and save them")
    scales = [name for name in unexpected if _SCALE.search(name)]
    if scales:
        raise ValueError(
            f"{_summary(scales)} is a scale of a quantisation that transformers does not apply: "
            "use the unquantised model"
        )


def _prefix_of(backbone: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is backbone)
    return f"{name}." if name else ""


def _summary(names: Collection[str]) -> str:
    """Returns the first of some tensor names and their number."""
    first, *others = names
    return f"{first} (the first of {len(names)})" if others else first
