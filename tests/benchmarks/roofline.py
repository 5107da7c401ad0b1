"""The CUDA path without a GPU: what a pack of the engine moves and computes, and how long a GPU takes at its best.

    python tests/benchmarks/roofline.py --model 0.6B --gpu H100

Runs the engine on fake tensors, which have shapes and no values, as it would run on CUDA, and counts each operation
that PyTorch launches: the bytes of what it reads and writes, and the FLOPs of products and attention. An operation
takes as long as the slower of both at the GPU's peak. Views are free. So are launches, which a GPU hides in packs of
this size, if nothing waits for it: `waits` lists what does.

`fused` is what the parts would move if each call of a module read its inputs once and wrote its results once, whatever
lies between. Weights, products and attention stay as they are. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from prefill_router.common.console import say
from prefill_router.common.schema import POOLINGS, activation_columns
from prefill_router.encoder import fused_modules, packed_backbone
from prefill_router.encoder.attention import VarlenAttention
from prefill_router.encoder.linear_products import LinearProduct
from prefill_router.encoder.pack import Pack
from prefill_router.encoder.pooling import Pooler

HEADS = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
MODELS = {  # Qwen3
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28},
    "8B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32, "num_hidden_layers": 36},
}
GPUS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
}  # dense bfloat16 FLOP/s and bytes/s: SXM
PRODUCTS, ATTENTION, POOLING, REST = "products with weights", "attention", "pooling", "embedding and residuals"
PARTS = {  # by the last name of the module whose operation it is
    "input_layernorm": "norms of states",
    "post_attention_layernorm": "norms of states",
    "norm": "norms of states",
    "q_norm": "norms of queries and keys",
    "k_norm": "norms of queries and keys",
    "self_attn": "rotary embedding",
    "mlp": "gates",
    "activation": "gates",
    POOLING: POOLING,
}
GATHERS = ("index", "index_select", "embedding")  # read as much as they write
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")


@dataclass
class Count:
    """The operations of one part."""

    operations: int = 0
    moved_bytes: int = 0
    fused_bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    fused_seconds: float = 0.0


@dataclass
class _Call:
    """What a module's call has read that it did not make, and made that it did not read."""

    name: str
    made: dict[int, Tensor] = field(default_factory=dict)  # by storage
    given: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)


class Counted(TorchDispatchMode):
    """Counts the operations on fake tensors by part, within the context."""

    def __init__(self, model: nn.Module, peaks: tuple[float, float], attention_flops: float) -> None:
        super().__init__()
        self.flops_per_s, self.bytes_per_s = peaks
        self.attention_flops = attention_flops  # of a layer
        self.parts: dict[str, Count] = {}
        self.waits: list[str] = []
        self._calls = [_Call("")]
        self._names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Attributes operations to modules, within the context."""
        hooks = [
            register_module_forward_pre_hook(
                lambda module, _args: self._calls.append(_Call(self._names.get(module, "")))
            ),
            register_module_forward_hook(lambda *_: self._end(), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._end()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._calls.append(_Call(name))
        yield
        self._end()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _fakes((args, kwargs)), _fakes(result)
        name = func._schema.name.rpartition("::")[2]
        if inputs and name in WAITS:
            self.waits.append(f"{name} in {self._calls[-1].name}")
        is_new = not {_storage(each) for each in outputs} & {_storage(each) for each in inputs}
        if inputs and outputs and (is_new or func._schema.is_mutable):
            self._count(name, inputs, outputs)
        return result

    def _count(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        call, part, flops = self._calls[-1], PARTS.get(self._calls[-1].name, REST), 0.0
        if name in ("linear", "mm", "addmm"):
            part, flops = PRODUCTS, 2.0 * outputs[0].numel() * inputs[0].shape[-1]
        elif name == "_varlen_attn":
            part, flops, outputs = ATTENTION, self.attention_flops, outputs[:1]
        elif name in GATHERS:
            inputs = outputs[:1]
        elif name == "index_fill_":  # some rows
            return
        moved = _size(inputs) + _size(outputs)
        seconds = max(flops / self.flops_per_s, moved / self.bytes_per_s)
        count = self.parts.setdefault(part, Count())
        count.operations += 1
        count.moved_bytes += moved
        count.flops += flops
        count.seconds += seconds
        if flops:
            count.fused_bytes += moved
            count.fused_seconds += seconds
            return
        for tensor in inputs:
            if _storage(tensor) in call.made:
                call.results.pop(_storage(tensor), None)
            else:
                call.given[_storage(tensor)] = max(tensor, call.given.get(_storage(tensor), tensor), key=Tensor.numel)
        for tensor in outputs:
            whole = max(tensor, call.made.get(_storage(tensor), tensor), key=Tensor.numel)
            call.made[_storage(tensor)] = call.results[_storage(tensor)] = whole

    def _begin(self, module: nn.Module) -> None:
        self._calls.append(_Call(self._names.get(module, "")))

    def _end(self) -> None:
        call = self._calls.pop()
        count = self.parts.setdefault(PARTS.get(call.name, REST), Count())
        fused = _size(list(call.given.values())) + _size(list(call.results.values()))
        count.fused_bytes += fused
        count.fused_seconds += fused / self.bytes_per_s


def _fakes(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, FakeTensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensors: list[Tensor]) -> int:
    """Bytes, of each tensor once."""
    return sum(each.numel() * each.element_size() for each in {id(each): each for each in tensors}.values())


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Fake tensors of bfloat16 take the engine's paths for CUDA, within the context."""

    def varlen(lengths: Sequence[int], prefix_tokens: int, device: Any, _dtype: Any, scoring: Any) -> VarlenAttention:
        with unset_fake_temporarily():  # its indices are computed from values, on the host
            return VarlenAttention(lengths, prefix_tokens, device, scoring)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]
        return normed

    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch.object(FakeTensor, "is_cuda", True))
        stack.enter_context(patch.object(packed_backbone, "attention_for", varlen))
        stack.enter_context(patch.object(F, "rms_norm", rms_norm))
        # Modules are replaced if they give the same values, which fake ones do not have.
        stack.enter_context(patch.object(fused_modules, "_equals", lambda *_: True))
        stack.enter_context(patch.object(fused_modules, "product_for", lambda _: LinearProduct))
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def measured(model: dict[str, int], peaks: tuple[float, float], lengths: list[int]) -> Counted:
    """Counts one pack through all layers, of which every state is pooled both ways."""
    config = Qwen3Config(**HEADS, **model)
    layers = range(model["num_hidden_layers"] + 1)
    pooler = Pooler(activation_columns(layers, POOLINGS), lengths, torch.device("cpu"), leave_out_first=True)
    fused_modules._with_fused_rotation(Qwen3Attention.forward)  # compares values: before there are none
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    flops = 4.0 * pairs * model["num_attention_heads"] * HEADS["head_dim"]
    with as_on_cuda(), torch.inference_mode():
        backbone = Qwen3Model(config).eval()
        packed = packed_backbone.PackedBackbone(backbone, backbone.layers)
        packed.pack_multiple = 1
        fused_modules.fuse(packed.blocks)
        for module in backbone.modules():
            if isinstance(module, fused_modules._RMSNorm):
                module.has_kernel = True
        pack = Pack(torch.empty(sum(lengths), dtype=torch.int64), lengths)
        counted = Counted(backbone, peaks, flops)

        def visit(layer: int, states_TD: Tensor) -> None:
            with counted.part(POOLING):
                pooler.visit(layer, states_TD)

        with counted, counted.modules():
            packed.run(pack, visit, layers[-1])
            pooler.result()
    return counted


def table(counted: Counted, num_tokens: int) -> str:
    lines = ["| part | operations | kB/token | MFLOP/token | us/1k tokens | fused kB/token | us/1k tokens |"]
    lines.append("| --- | --: | --: | --: | --: | --: | --: |")
    total = Count()
    rows = sorted(counted.parts.items(), key=lambda item: -item[1].seconds)
    for _, part in rows:
        for name, value in asdict(part).items():
            setattr(total, name, getattr(total, name) + value)
    for name, part in [*rows, ("all", total)]:
        per_token = (part.moved_bytes / 1e3, part.flops / 1e6, part.seconds * 1e9, part.fused_bytes / 1e3)
        cells = " | ".join(f"{value / num_tokens:,.1f}" for value in (*per_token, part.fused_seconds * 1e9))
        lines.append(f"| {name} | {part.operations} | {cells} |")
    of_products = total.flops / counted.flops_per_s
    shares = f"of the FLOP/s at best {of_products / total.seconds:.0%}, fused {of_products / total.fused_seconds:.0%}"
    return "\n".join(
        [*lines, f"{num_tokens / total.seconds:,.0f} tokens/s, {shares}; waits: {counted.waits or 'none'}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="0.6B")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a pack")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    given = parser.parse_args()
    lengths = [given.prompt_tokens] * (given.tokens // given.prompt_tokens)
    counted = measured(MODELS[given.model], GPUS[given.gpu], lengths)
    say(table(counted, sum(lengths)))
    report = {name: asdict(part) for name, part in counted.parts.items()}
    sys.stdout.write(json.dumps({**vars(given), "parts": report, "waits": counted.waits}) + "\n")


if __name__ == "__main__":
    main()
