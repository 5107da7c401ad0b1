"""Places a model on a device, or divides one that is larger than a GPU over all GPUs of the process.

Each GPU gets consecutive blocks, and accelerate's hooks move a block's inputs to its GPU. The GPUs work one after
another: several add memory, not speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prefill_router.common.errors import one_line

# Values per token that a forward pass holds at a time, in widths of a block's widest matrix. Counted in packs of small
# models: 3.9 in a Llama and an OLMo 2, 4.2 in a Qwen3. Attention with windows or soft caps holds its scores besides.
_LIVE_WIDTHS = 6


def place(backbone: Any, blocks: nn.ModuleList, device: str, pack_tokens: int) -> Any:
    """Moves a model to `device` and returns it. On "cuda", a model that is larger than a GPU is divided over all.

    Leaves room for the activations of a pack of `pack_tokens` tokens. Raises ValueError if the GPUs are too small.
    """
    gpus = gpus_of(device)
    if not gpus:
        return backbone.to(device)
    activations = activation_bytes(blocks[0], pack_tokens) if len(gpus) > 1 else 0
    if num_bytes(backbone) + activations <= free_bytes(gpus[0]):
        return backbone.to(device)
    return divide(backbone, blocks, {gpu: max(0, free_bytes(gpu) - activations) for gpu in gpus})


def divide(backbone: Any, blocks: nn.ModuleList, room: Mapping[torch.device, int]) -> Any:
    """Divides a model over GPUs with `room` bytes each, and returns it. Raises ValueError if they are too small."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kinds = sorted({type(block).__name__ for block in blocks})
    limits = get_balanced_memory(backbone, dict(enumerate(room.values())), kinds)
    found = infer_auto_device_map(backbone, limits, kinds, offload_buffers=True)
    if "disk" in found.values():
        raise ValueError(
            f"its {num_bytes(backbone) / 1e9:.1f} GB of weights do not fit into the {sum(room.values()) / 1e9:.1f} GB "
            "that its GPUs have free for them: use more GPUs (of a job, by --gpus-per-worker)"
        )
    gpus = list(room)
    path = next(name for name, module in backbone.named_modules() if module is blocks)
    # What is not in the blocks is needed before them, in whichever order it was declared, or is small.
    places = {name: gpus[index if name.startswith(path) else 0] for name, index in found.items()}
    return dispatch_model(backbone, places, main_device=gpus[0])


@contextmanager
def division_errors(devices: Sequence[torch.device]) -> Iterator[None]:
    """Says that a model cannot be divided, as a ValueError, if it fails on several devices."""
    try:
        yield
    except RuntimeError as error:
        if len(devices) == 1:
            raise
        raise ValueError(
            f"it cannot be divided over {len(devices)} GPUs ({one_line(error)}): use a GPU that has room for all of it"
        ) from None


def gpus_of(device: str) -> list[torch.device]:
    """Returns all GPUs of the process for "cuda", and none for the name of a single device."""
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if device == "cuda" else []


def free_bytes(gpu: torch.device) -> int:
    """Returns the free memory, with what torch keeps of freed tensors."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def num_bytes(model: nn.Module) -> int:
    """Returns the memory of a model's weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def activation_bytes(block: nn.Module, num_tokens: int) -> int:
    """Estimates the memory that one pack's forward pass takes besides weights."""
    widest = max((max(w.shape) * w.element_size() for w in block.parameters() if w.ndim > 1), default=0)
    return num_tokens * widest * _LIVE_WIDTHS
