"""What the machine is good at: the number type to compute in, and the rate that it can reach at most."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Literal

import torch

DType = Literal["bfloat16", "float32"]

_CPUINFO = Path("/proc/cpuinfo")  # Linux alone has it


def preferred_dtype(device: str) -> DType:
    """bfloat16 where the hardware is fast at it, otherwise float32. It hangs on the kind of hardware alone.

    A measurement would tell more, but not the same each time, and activations of one type do not fit the other's.
    """
    if device == "cpu":
        # Intel's AVX-512 does half as many products in bfloat16 as in float32 (measured: 85 and 160 GFLOP/s a core).
        fast = has_amx() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def has_amx() -> bool:
    """Does this CPU have Intel's matrix unit, and torch use it?"""
    return torch.cpu._is_amx_tile_supported()


def _is_intel() -> bool:
    return "GenuineIntel" in (_CPUINFO.read_text() if _CPUINFO.exists() else platform.processor())


def bound_kernel_caches() -> None:
    """Keeps memory flat: oneDNN and torch's layer over it each keep a compiled kernel, 1 to 2 MB, for every shape.

    Packs have a thousand lengths, which would be a gigabyte; compiling one anew takes under a millisecond. With AMX it
    takes 7, and packs have 16 lengths for that (see `Decoder.pack_multiple`), whose products all find room. It has to
    come before the first product, and leaves alone what the user has set.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


@torch.inference_mode()
def measured_peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 6) -> float:
    """FLOP/s of the fastest of a few large matrix products, with the threads that torch has now."""
    size = 8192 if device.type == "cuda" else 1024  # which reaches the rate of larger ones, in a tenth of the time
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
