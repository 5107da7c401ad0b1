"""The encoder: a small causal LM that computes prefill activations of prompts, verified against transformers on load.

Start with `prefill_encoder` (PrefillEncoder), then `checkpoint` (loads weights) and `packed_backbone` (forward passes).
The names below are imported on first use, because they import torch, which many users of this package do not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
    from prefill_router.encoder.prefill_encoder import PrefillEncoder

__all__ = ["EncoderIdentity", "EncoderSpec", "PrefillEncoder"]

_MODULES = {"EncoderIdentity": "encoder_spec", "EncoderSpec": "encoder_spec", "PrefillEncoder": "prefill_encoder"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
