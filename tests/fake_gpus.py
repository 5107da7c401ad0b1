"""Fake GPUs: tensors of the CPU that say they are on a device, and operations that refuse to mix devices.

As on real GPUs, only copies cross devices, and numpy reads nothing on one. A model that is divided over fake GPUs can
be compared with itself on one of them, bit by bit. `torch.privateuseone` is torch's name for devices of other projects.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prefill_router.encoder import attention

_KIND = "privateuseone"
_CPU = torch.device("cpu")
_COPIES = {torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_}


def fake_gpu(index: int) -> torch.device:
    return torch.device(_KIND, index)


class FakeGpus(TorchDispatchMode):
    """Tensors can be created on fake GPUs and moved to them while it is entered."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        patch.setitem(sys.modules, f"torch.{_KIND}", ModuleType(_KIND))
        # torch's own mask for devices cannot be created here.
        mask = attention._causal_mask
        patch.setattr(attention, "_causal_mask", lambda q, k, like: mask(q, k, like.values).to(like.device))

    def __enter__(self) -> FakeGpus:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` would otherwise allocate on the device
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Guard(torch._C._acc.DeviceGuard):
    """Lets torch switch to a fake GPU, which does nothing."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


torch._C._acc.register_python_privateuseone_device_guard(_Guard())


class _OnGpu(Tensor):
    values: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> _OnGpu:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        with torch.inference_mode(False):  # a view that is an inference tensor, of a weight that is none, would fail
            tensor: _OnGpu = Tensor._make_wrapper_subclass(cls, values.shape, **layout, device=device)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU. Its results are on the device that it names, or on that of its arguments."""
    device = _device(operation, tree_leaves((args, kwargs)))
    known = {id(leaf.values): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _OnGpu)}
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    if operation.overloadpacket is torch.ops.aten.histc:  # of integers, which only real GPUs count
        args = (args[0].float(), *args[1:])

    def placed(result: Any) -> Any:
        if not isinstance(result, Tensor) or device.type != _KIND:
            return result
        same = known.get(id(result))
        return same if same is not None and same.device == device else _OnGpu(result, device)

    return tree_map(placed, operation(*args, **kwargs))


def _device(operation: Any, leaves: list[Any]) -> torch.device:
    """Returns the device of the results. Raises RuntimeError if the arguments are on several."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if operation.overloadpacket in _COPIES:
        return named[0] if named else tensors[0].device
    # As on real GPUs, single values of the CPU go with any device.
    devices = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, _OnGpu)}
    if len(devices) > 1:
        raise RuntimeError(f"{operation} mixes {', '.join(sorted(map(str, devices)))}")
    return named[0] if named else next(iter(devices), _CPU)


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return _CPU if leaf.type == _KIND else leaf
    return leaf.values if isinstance(leaf, _OnGpu) else leaf
