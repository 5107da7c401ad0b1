"""The encoder: a causal LM that reads prompts through prefill alone, and what it takes to load one exactly.

The names below are imported when they are asked for, as they bring torch along, which readers of token counts and of
chat templates do without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefill_router.encoder.prefill_encoder import EncoderIdentity, EncoderSpec, PrefillEncoder

__all__ = ["EncoderIdentity", "EncoderSpec", "PrefillEncoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("prefill_router.encoder.prefill_encoder"), name)
