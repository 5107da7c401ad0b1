"""Replaces modules of a transformers model by equal ones that make fewer passes over memory, for any model family.

Families share a few forms of norms, gated MLPs, projections and rotary embedding. A module is recognised by its form,
and replaced only if the new one gives the same for random inputs of several magnitudes.
"""

# T tokens, H heads, E head size, R rotated part of it

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from prefill_router.encoder.linear_products import ReorderedProduct, product_for
from prefill_router.encoder.verification import relative_error

_MAGNITUDES = (1e-3, 1.0, 1e3)  # of inputs: an epsilon shows in the first, a clamp in the last
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # on relative errors; modules of other dtypes stay
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_ROTATION = "apply_rotary_pos_emb"  # the name in transformers of the function that rotates queries and keys
_latest = threading.local()  # a thread's latest shared product, its input and its parts


@torch.no_grad()
def fuse(blocks: nn.Module) -> Callable[[], None]:
    """Replaces modules of a model's blocks in place. Returns a function that restores the original ones."""
    undo: list[Callable[[], None]] = []
    _fuse(blocks, undo)

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _fuse(parent: nn.Module, undo: list[Callable[[], None]]) -> None:
    projections = _shared_projections(parent)
    for name, child in list(parent.named_children()):
        fused = projections.get(name) or _fused(child)
        if fused is None:
            _fuse(child, undo)
        else:
            undo.append(partial(setattr, parent, name, child))
            setattr(parent, name, fused)
    rotating = _with_fused_rotation(type(parent).forward)
    if rotating is not None:
        _set_forward(parent, MethodType(rotating, parent), undo)


def _set_forward(module: Any, forward: MethodType, undo: list[Callable[[], None]]) -> None:
    """Replaces a module's own forward, unless someone else has replaced it."""
    if hasattr(module, "_hf_hook"):  # accelerate moves a divided model's inputs, and then calls this
        undo.append(partial(setattr, module, "_old_forward", module._old_forward))
        module._old_forward = forward
    elif "forward" not in vars(module):
        undo.append(partial(delattr, module, "forward"))
        module.forward = forward


def _fused(module: nn.Module) -> nn.Module | None:
    """Returns a faster module that equals `module`, or None if none is known."""
    if _is_linear(module):
        kind = product_for(module.weight)
        return kind(module) if kind is ReorderedProduct else None
    return _GatedMLP.of(module) or _RMSNorm.of(module)


def _is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear layer. Quantised and adapted ones compute more than a product with their weight."""
    return type(module) is nn.Linear


def _equals(fused: nn.Module, module: nn.Module, weight: Tensor) -> bool:
    """Whether both modules give the same for random vectors as long as a row of `weight`."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, weight.shape[-1], generator=random) + 0.5
    inputs = [(magnitude * vectors).to(weight) for magnitude in _MAGNITUDES]
    try:
        return all(relative_error(fused(x), module(x)) < _BOUNDS.get(weight.dtype, 0.0) for x in inputs)
    except Exception:  # a module of another signature
        return False


class _RMSNorm(nn.Module):
    """Divides vectors by their root mean square and multiplies by the weight plus `offset`."""

    def __init__(self, weight: Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.wide_weight = weight.float() + offset
        self.has_kernel = offset == 0 and weight.device.type != "cpu"

    @classmethod
    def of(cls, module: Any) -> _RMSNorm | None:
        """Returns the equal of a norm that multiplies by its weight, or by one plus its weight."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if [*module.state_dict()] != ["weight"] or module.weight.ndim != 1 or not isinstance(eps, float):
            return None
        candidates = (cls(module.weight, eps, offset) for offset in (0.0, 1.0))
        return next((norm for norm in candidates if _equals(norm, module, module.weight)), None)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_kernel:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The same formula as F.rms_norm, with half as many passes over memory on a CPU.
        wide = x.float()
        mean_square: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        in_place = None if wide is x else wide
        scaled = torch.mul(wide, mean_square.add_(self.eps).rsqrt_(), out=in_place)
        return scaled.mul_(self.wide_weight).to(x.dtype)


class _GatedMLP(nn.Module):
    """Computes down(activation(gate(x)) * up(x))."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        product = product_for(mlp.gate_proj.weight)
        self.gate, self.up, self.down = product(mlp.gate_proj), product(mlp.up_proj), product(mlp.down_proj)
        self.activation = mlp.act_fn
        self.is_silu = type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")

    @classmethod
    def of(cls, mlp: Any) -> _GatedMLP | None:
        layers = {name: child for name, child in mlp.named_children() if name != "act_fn"}
        is_gated = {*layers} == {"gate_proj", "up_proj", "down_proj"} and hasattr(mlp, "act_fn")
        if not is_gated or not all(map(_is_linear, layers.values())):
            return None
        fused = cls(mlp)
        return fused if _equals(fused, mlp, mlp.gate_proj.weight) else None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate.silu(x) if self.is_silu else self.activation(self.gate(x))
        down: Tensor = self.down(self.up.multiplied(x, gate))
        return down


class _SharedProduct:
    """Several linear layers as one product, computed when the first of them is called with an input."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.product = product_for(layers[0].weight)(*layers)
        self.widths = [layer.out_features for layer in layers]

    def part(self, index: int, x: Tensor) -> Tensor:
        """Returns the output of layer `index`."""
        if getattr(_latest, "product", None) is not self or _latest.input is not x:
            _latest.product, _latest.input = self, x
            _latest.parts = self.product(x).split(self.widths, -1)
        part: Tensor = _latest.parts[index]
        if index == len(self.widths) - 1:
            vars(_latest).clear()  # frees the states
        return part


class _Projection(nn.Module):
    """One layer of a `_SharedProduct`."""

    def __init__(self, shared: _SharedProduct, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.part(self.index, x)


def _shared_projections(attention: nn.Module) -> dict[str, nn.Module]:
    layers: list[Any] = [getattr(attention, name, None) for name in _PROJECTIONS]
    if not all(map(_is_linear, layers)):
        return {}
    if len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}) > 1:
        return {}
    shared = _SharedProduct(layers)
    return {name: _Projection(shared, index) for index, name in enumerate(_PROJECTIONS)}


@cache
def _with_fused_rotation(forward: Any) -> FunctionType | None:
    """Returns `forward` of an attention module with `rotated` as its rotary embedding, or None if that differs."""
    if _ROTATION not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    if not _is_rotation(forward.__globals__.get(_ROTATION)):
        return None
    names = {**forward.__globals__, _ROTATION: rotated}
    fused = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _is_rotation(function: Any) -> bool:
    """Whether `function` equals `rotated`, which is linear in each argument: one random input is enough."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 5, 8, generator=random) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=random) for _ in range(2))
    try:
        pairs = zip(rotated(query, key, cos, sin), function(query, key, cos, sin), strict=True)
        return all(relative_error(ours, theirs) < _BOUNDS[torch.float32] for ours, theirs in pairs)
    except Exception:  # a function of another signature
        return False


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Applies rotary embedding to (1, H, T, E), or (1, T, H, E) if `unsqueeze_dim` is 2.

    cos and sin are (1, T, R): the first R of E numbers are rotated.
    """
    half = cos.shape[-1] // 2
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(unsqueeze_dim)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    own, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    # In place, half by half: five passes over the numbers. The turned vector would be written and read as well.
    result = own * cos
    first, second = own.chunk(2, -1)
    for half, turned, sin in zip(result.chunk(2, -1), (second, first), signed_sin.chunk(2, -1), strict=True):
        half.addcmul_(turned, sin)
    result = result.to(x.dtype)
    return torch.cat((result, rest), -1) if rest.shape[-1] else result
