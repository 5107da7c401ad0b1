"""What a transformers model says of its own shape. Families name the same thing differently, or not at all."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from prefill_router.common.errors import UserError
from prefill_router.encoder.prefill_work import ModelCost

_DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")
_SENSES = re.compile("vision|visual|image|audio|speech")
_CONTEXT = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions")
_SELECTED_KEYS = ("index_topk", "keep_window_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def text_config(backbone: Any) -> Any:
    """The config of the language model, where the backbone has others beside it."""
    return backbone.config.get_text_config()


def backbone_of(model: Any) -> Any:
    """The part of a model of transformers that reads text: no heads, and nothing that sees or hears."""
    part = model.get_decoder()
    part = part if hasattr(part, "config") else model.base_model
    while (inner := _inner(part)) is not part:
        part = inner
    return part


def _inner(part: Any) -> Any:
    """The model below a head; a model without one is its own."""
    return part.base_model if part.base_model is not part else getattr(part, "model", part)


def find_blocks(backbone: nn.Module) -> nn.ModuleList:
    """The list of a model's blocks. Raises UserError if there is none."""
    depths = [depth for name in _DEPTHS if (depth := _number(text_config(backbone), name))]
    for depth in depths:
        for name, module in backbone.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth and not _SENSES.search(name):
                return module
    raise UserError(f"{type(backbone).__name__} has no list of {depths[0] if depths else 'its'} blocks")


def context_tokens(config: Any) -> int | None:
    """The most tokens that a model takes, where it says so."""
    return _number(config, *_CONTEXT)


def short_rope_tokens(config: Any) -> int | None:
    """The length of prompts beyond which a model's rotary embedding takes other frequencies, where it does."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


def selects_keys(config: Any) -> bool:
    """Does attention take the best of a prompt's keys? Those of padding would be among them."""
    return _number(config, *_SELECTED_KEYS) is not None


def is_the_same_at_any_length(config: Any) -> bool:
    """Do tokens read a prompt's keys by rules that short prompts show too, windows apart?"""
    rope = getattr(config, "rope_parameters", None) or {}
    depends_on_length = any("dynamic" in str(kind) or "longrope" in str(kind) for kind in _rope_types(rope))
    chunked = _number(config, "attention_chunk_size") is not None
    return not (depends_on_length or chunked or selects_keys(config))


def has_windows(config: Any) -> bool:
    """Do some of a model's tokens see a window of the last ones alone?"""
    kinds = getattr(config, "layer_types", None)
    is_used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return bool(is_used) and _number(config, "sliding_window") is not None


def _rope_types(rope: dict[str, Any]) -> list[Any]:
    """One, or one for each kind of layer."""
    nested = [kind.get("rope_type") for kind in rope.values() if isinstance(kind, dict)]
    return [rope.get("rope_type"), *nested]


def block_cost(block: nn.Module, config: Any) -> ModelCost:
    """What a token costs in a block. Experts, stacked in one tensor, count by the share of them that reads a token."""
    experts, used = _number(config, *_EXPERTS), _number(config, *_EXPERTS_OF_A_TOKEN)
    share = used / experts if experts and used else 1.0
    num_weights = sum(w.numel() * (share if w.ndim == 3 and len(w) == experts else 1.0) for w in _matrices(block))
    return ModelCost.of_block(int(num_weights), _attention_width(config))


def _matrices(block: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in block.parameters() if weight.ndim > 1]


def _attention_width(config: Any) -> int:
    """Heads times head size; 0 where a model has no attention."""
    heads = _number(config, "num_attention_heads") or 0
    return heads * (_number(config, "head_dim") or config.hidden_size // max(1, heads))


def architecture(config: Any) -> dict[str, Any]:
    """What of a model's config changes its activations: all that is not default, but where it came from."""
    incidental = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
    return {key: value for key, value in config.to_diff_dict().items() if key not in incidental}


def _number(config: Any, *names: str) -> int | None:
    """The first of some attributes that is a whole number."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
