"""What the machine is good at: the number type to compute in, and the rate that it can reach at most."""

from __future__ import annotations

import time
from typing import Literal

import torch

DType = Literal["bfloat16", "float32"]


def preferred_dtype(device: str) -> DType:
    """bfloat16 where the hardware multiplies it natively, otherwise float32."""
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


@torch.inference_mode()
def measured_peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 6) -> float:
    """FLOP/s of the fastest of a few large matrix products, with the threads that torch has now."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    fastest_s = min(_product_s(a, b) for _ in range(repeats))
    return 2 * size**3 / fastest_s


def _product_s(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
