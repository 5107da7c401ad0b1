"""How large an encoder is, told from its config: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefill_router.encoder import checkpoint
from prefill_router.encoder.architecture import backbone_of, block_cost, find_blocks, text_config
from prefill_router.encoder.prefill_work import ModelCost


@dataclass(frozen=True)
class EncoderSize:
    num_layers: int
    hidden_size: int
    block: ModelCost  # of one of the layers

    @classmethod
    def of(cls, model: str) -> EncoderSize:
        """Of a hub id, a directory or `package:NAME`. Raises UserError where that leads to no causal LM."""
        model_config = checkpoint.check_causal_lm(model)
        with torch.device("meta"):
            backbone = backbone_of(checkpoint.text_class(model_config).from_config(model_config))
        config = text_config(backbone)
        blocks = find_blocks(backbone)
        return cls(len(blocks), config.hidden_size, block_cost(blocks[0], config))
