"""A dense decoder for prefill only: one forward pass over a pack of prompts, without padding, KV cache or logits.

It uses the weights of a transformers model of one of the FAMILIES and computes the same hidden states. It is faster
because projections are fused, prompts are packed without padding, and the pass ends at the deepest requested layer.
"""

# T tokens of a pack, D hidden size, H heads, K key-value heads, E head size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from prefill_router.encoder.attention import KeyValue, attention_for
from prefill_router.encoder.hardware import has_amx

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Visit = Callable[[int, Tensor], None]  # called with the index in `hidden_states` and the states (T, D)


@dataclass(frozen=True)
class Pack:
    """Concatenated prompts, all of which may continue one shared prefix."""

    ids: Tensor  # (T,) int64
    lengths: list[int]  # tokens of each prompt after the prefix
    prefix: list[KeyValue] | None = None  # keys and values of the prefix for each layer, kept by `Decoder.run`

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device, prefix: list[KeyValue] | None = None) -> Pack:
        ids = torch.tensor([i for prompt in prompts for i in prompt])
        if device.type == "cuda":
            ids = ids.pin_memory()
        return cls(ids.to(device, non_blocking=True), [len(prompt) for prompt in prompts], prefix)

    @property
    def prefix_tokens(self) -> int:
        return len(self.prefix[0][0]) if self.prefix else 0

    def positions(self) -> Tensor:
        """Returns each token's position in its prompt, prefix included, (T,) int64."""
        start = self.prefix_tokens
        return torch.cat([torch.arange(start, start + n) for n in self.lengths]).to(self.ids.device)

    def padded(self, multiple: int) -> Pack:
        """Pads the last prompt to make the pack a multiple of `multiple` tokens. Causality hides the padding."""
        padding = -len(self.ids) % multiple
        if not padding:
            return self
        return Pack(F.pad(self.ids, (0, padding)), [*self.lengths[:-1], self.lengths[-1] + padding], self.prefix)


class Decoder:
    """Runs packs through the decoder's blocks. Create one with `Decoder.from_transformers`."""

    is_packed = True  # no padding; prompts may continue a prefix

    def __init__(self, backbone: Any) -> None:
        config = backbone.config
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.embedding: Tensor = backbone.embed_tokens.weight
        self.frequencies: Tensor = backbone.rotary_emb.inv_freq
        self.rotary_scale: float = backbone.rotary_emb.attention_scaling
        linear = _linear_for(self.device, self.dtype)
        # oneDNN compiles a kernel per number of rows: 7 ms on AMX, half of a pack's time; under 1 ms elsewhere.
        self.pack_multiple = 64 if linear is _PackedLinear and has_amx() else 1
        self.blocks = [_Block(block, linear) for block in backbone.layers]
        self.final_norm = _RMSNorm(backbone.norm)

    @classmethod
    def from_transformers(cls, backbone: Any, max_tokens: int) -> Decoder | None:
        """Returns None for an unsupported model: another family, windowed attention, or non-standard linear layers."""
        config = backbone.config
        rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        window = getattr(config, "sliding_window", None) or max_tokens
        fits = (
            config.model_type in FAMILIES
            and rotary in ("default", "linear", "llama3", "yarn")
            and config.hidden_act == "silu"
            and window >= max_tokens
            # Quantised and adapted layers compute more than a product with their weight.
            and all(type(m) is nn.Linear for m in backbone.layers.modules() if hasattr(m, "in_features"))
        )
        return cls(backbone) if fits else None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def run(self, pack: Pack, visit: Visit, deepest: int, keep: list[KeyValue] | None = None) -> None:
        """Calls `visit(layer, states)` for layers 0 to `deepest`; the model's last layer is taken after the final norm.

        Appends each layer's keys and values to `keep`, for packs that continue this one.
        """
        num_tokens = len(pack.ids)
        pack = pack.padded(self.pack_multiple)
        attend = attention_for(pack.lengths, pack.prefix_tokens, self.device, self.dtype)
        rotate = self._rotation(pack)
        states = F.embedding(pack.ids, self.embedding)
        visit(0, states[:num_tokens])
        for layer, block in enumerate(self.blocks[:deepest]):
            query, key, value = block.project(states, self.head_size, rotate)
            if keep is not None:
                keep.append((key[:num_tokens], value[:num_tokens]))
            attended = attend(query, key, value, pack.prefix[layer] if pack.prefix else None)
            states = block.finish(states, attended.flatten(1))
            visible = states[:num_tokens]
            is_last = layer + 1 == len(self.blocks)
            visit(layer + 1, self.final_norm(visible) if is_last else visible)

    def _rotation(self, pack: Pack) -> Callable[[Tensor], Tensor]:
        """Returns a function that applies rotary embedding to (T, heads, E), with transformers' layout of a head."""
        angles = pack.positions()[:, None, None].float() * self.frequencies
        cos, sin = ((f(angles) * self.rotary_scale).to(self.dtype) for f in (torch.cos, torch.sin))
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return lambda x: torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Block:
    """One decoder layer: attention and a gated MLP, each after a norm and added to the residual stream."""

    def __init__(self, block: Any, linear: type[_Linear]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.widths = [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.project_all = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.project_out = linear(attention.o_proj)
        self.gate, self.up, self.down = linear(mlp.gate_proj), linear(mlp.up_proj), linear(mlp.down_proj)
        self.attention_norm, self.mlp_norm = _RMSNorm(block.input_layernorm), _RMSNorm(block.post_attention_layernorm)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.query_norm, self.key_norm = (None if norm is None else _RMSNorm(norm) for norm in norms)

    def project(self, states: Tensor, head_size: int, rotate: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Returns queries (T, H, E), keys and values (T, K, E), with queries and keys rotated."""
        projected = self.project_all(self.attention_norm(states))
        heads = projected.view(len(states), -1, head_size)
        query, key, value = torch.split(heads, [width // head_size for width in self.widths], 1)
        if self.query_norm is not None and self.key_norm is not None:
            return rotate(self.query_norm(query)), rotate(self.key_norm(key)), value
        num_heads, num_values = query.shape[1], value.shape[1]
        rotated = rotate(heads[:, :-num_values])
        return rotated[:, :num_heads], rotated[:, num_heads:], value

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        states = self.project_out.added(attended, states)
        normed = self.mlp_norm(states)
        return self.down.added(self.up.multiplied(normed, self.gate.silu(normed)), states)


class _RMSNorm:
    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight, module.variance_epsilon
        self.wide_weight = self.weight.float()

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The same formula as F.rms_norm, with half as many passes over memory on a CPU.
        wide = x.float()
        mean_square: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return (wide * mean_square.add_(self.eps).rsqrt_()).mul_(self.wide_weight).to(x.dtype)


class _Linear:
    """A linear layer with optional fused elementwise operations. Several modules are fused into one product."""

    def __init__(self, *modules: nn.Linear) -> None:
        self.weight = torch.cat(tuple(m.weight for m in modules))
        biases = [m.bias for m in modules]
        self.bias = None if biases[0] is None else torch.cat(tuple(biases))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def multiplied(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class _PackedLinear(_Linear):
    """oneDNN's matrix product with prepacked weights, with elementwise operations fused while tiles are in cache."""

    def __init__(self, *modules: nn.Linear) -> None:
        super().__init__(*modules)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 1024)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        return self._product(x, "swish")

    def multiplied(self, x: Tensor, other: Tensor) -> Tensor:
        return self._product_with(other, x, "mul")

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        return self._product_with(other, x, "add")

    def _product(self, x: Tensor, then: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")
        return product

    def _product_with(self, other: Tensor, x: Tensor, then: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, then)
        return product


def _linear_for(device: torch.device, dtype: torch.dtype) -> type[_Linear]:
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _PackedLinear if has_product and device.type == "cpu" and dtype == torch.bfloat16 else _Linear
