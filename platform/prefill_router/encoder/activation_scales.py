"""Powers of two that the states of each layer are divided by, so that float16 can store them.

Gemma 2 and 3 are known for large activations. They add nothing but outputs of RMS norms to the residual stream, so
their weights bound every state of every prompt. The scales follow from these bounds: nothing is clamped, and all
workers and devices agree. Other models have no such bound and no scales; what exceeds float16 is clamped and counted.
"""

# D hidden size

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from prefill_router.encoder.architecture import text_config
from prefill_router.encoder.pooling import FLOAT16_MAX

FAMILIES = ("gemma2", "gemma3_text")
_MARGIN = 2.0  # for rounding in bfloat16, which can exceed a bound by a quarter over 62 blocks


def activation_scales(backbone: Any) -> list[int]:
    """Returns the scale of each layer, as numbered in `hidden_states`. Empty if all are 1.

    `backbone` is a transformers model whose weights are loaded.
    """
    if text_config(backbone).model_type not in FAMILIES:
        return []
    scales = [2 ** max(0, math.frexp(_MARGIN * bound / FLOAT16_MAX)[1]) for bound in _bounds(backbone)]
    return scales if max(scales) > 1 else []


def _bounds(backbone: Any) -> Iterator[float]:
    """Yields the bound on the magnitude of each layer's states; the last layer's are after the final norm."""
    least, greatest = backbone.embed_tokens.weight.aminmax()
    bound = math.sqrt(backbone.config.hidden_size) * max(-float(least), float(greatest))
    yield bound
    for block in backbone.layers[:-1]:
        bound += _bound(block.post_attention_layernorm) + _bound(block.post_feedforward_layernorm)
        yield bound
    yield _bound(backbone.norm)


def _bound(norm: nn.Module) -> float:
    """Returns the largest output of x / rms(x) * (1 + weight), where no element of x exceeds sqrt(D) rms(x)."""
    factors_D = 1.0 + norm.get_parameter("weight").float()
    return math.sqrt(len(factors_D)) * float(factors_D.abs().max())
