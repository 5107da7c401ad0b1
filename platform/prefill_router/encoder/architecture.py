"""Reads a transformers model's structure from its config and modules, whose names differ between model families."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from prefill_router.common.errors import UserError
from prefill_router.encoder.prefill_work import ModelCost

_DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")
_OTHER_MODALITY = re.compile("vision|visual|image|audio|speech")
_CONTEXT = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions")
_SELECTED_KEYS = ("index_topk", "keep_window_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def text_config(backbone: Any) -> Any:
    """Returns the config of the language model, which a multimodal config nests."""
    return backbone.config.get_text_config()


def backbone_of(model: Any) -> Any:
    """Returns the text decoder of a transformers model, without heads and without vision or audio towers."""
    part = model.get_decoder()
    part = part if hasattr(part, "config") else model.base_model
    while (inner := _inner(part)) is not part:
        part = inner
    return part


def _inner(part: Any) -> Any:
    """Returns the model below a head, or `part` itself if it has no head."""
    return part.base_model if part.base_model is not part else getattr(part, "model", part)


def find_blocks(backbone: nn.Module) -> nn.ModuleList:
    """Returns the list of a model's decoder blocks. Raises UserError if there is none."""
    depths = [depth for name in _DEPTHS if (depth := _number(text_config(backbone), name))]
    for depth in depths:
        for name, module in backbone.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth and not _OTHER_MODALITY.search(name):
                return module
    num_blocks = depths[0] if depths else "its"
    raise UserError(f"{type(backbone).__name__} has no ModuleList of {num_blocks} blocks: choose another model")


def context_tokens(config: Any) -> int | None:
    """Returns the model's context length, or None if its config gives none."""
    return _number(config, *_CONTEXT)


def short_rope_tokens(config: Any) -> int | None:
    """Returns the prompt length beyond which a LongRoPE model switches its frequencies; None for other models."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


def selects_keys(config: Any) -> bool:
    """Whether attention selects the top-scoring keys of a prompt. It could then select keys of padding."""
    return _number(config, *_SELECTED_KEYS) is not None


def is_length_independent(config: Any) -> bool:
    """Whether attention follows the same rules at any prompt length, apart from windows.

    Only then does a check on short prompts also hold for long ones.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    depends_on_length = any("dynamic" in str(kind) or "longrope" in str(kind) for kind in _rope_types(rope))
    chunked = _number(config, "attention_chunk_size") is not None
    return not (depends_on_length or chunked or selects_keys(config))


def has_windows(config: Any) -> bool:
    """Whether some layers use sliding-window attention."""
    kinds = getattr(config, "layer_types", None)
    is_used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return bool(is_used) and _number(config, "sliding_window") is not None


def _rope_types(rope: dict[str, Any]) -> list[Any]:
    """Returns the RoPE types: one, or one for each kind of layer."""
    nested = [kind.get("rope_type") for kind in rope.values() if isinstance(kind, dict)]
    return [rope.get("rope_type"), *nested]


def block_cost(block: nn.Module, config: Any) -> ModelCost:
    """Returns the compute cost of one block. Stacked expert weights count by the share of experts used per token."""
    experts, used = _number(config, *_EXPERTS), _number(config, *_EXPERTS_PER_TOKEN)
    share = used / experts if experts and used else 1.0
    num_weights = sum(w.numel() * (share if w.ndim == 3 and len(w) == experts else 1.0) for w in _matrices(block))
    return ModelCost.of_block(int(num_weights), _attention_width(config))


def _matrices(block: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in block.parameters() if weight.ndim > 1]


def _attention_width(config: Any) -> int:
    """Returns heads times head size; 0 for a model without attention."""
    heads = _number(config, "num_attention_heads") or 0
    return heads * (_number(config, "head_dim") or config.hidden_size // max(1, heads))


def architecture(config: Any) -> dict[str, Any]:
    """Returns the non-default config values that can change activations."""
    incidental = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
    return {key: value for key, value in config.to_diff_dict().items() if key not in incidental}


def _number(config: Any, *names: str) -> int | None:
    """Returns the first of the named attributes that is an integer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
