"""Hardware properties: the preferred dtype, kernel caches, and the peak rate of matrix products."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Literal

import torch

DType = Literal["bfloat16", "float32"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
_CPUINFO = Path("/proc/cpuinfo")  # Linux only


def preferred_dtype(device: str) -> DType:
    """Returns bfloat16 if the hardware computes it fast, otherwise float32. Depends on the hardware type only.

    A measurement could differ from run to run, and activations of different dtypes cannot be mixed.
    """
    if device == "cpu":
        # Intel's AVX-512 is half as fast in bfloat16 as in float32 (measured: 85 and 160 GFLOP/s per core).
        fast = has_amx() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def has_amx() -> bool:
    """Whether this CPU has Intel's matrix unit (AMX) and torch supports it."""
    return torch.cpu._is_amx_tile_supported()


def _is_intel() -> bool:
    return "GenuineIntel" in (_CPUINFO.read_text() if _CPUINFO.exists() else platform.processor())


def bound_kernel_caches() -> None:
    """Limits the caches of compiled kernels in oneDNN and in torch's layer above it, which hold 1 to 2 MB per shape.

    Packs have about a thousand lengths, which would take a gigabyte, while recompiling takes under 1 ms. With AMX it
    takes 7 ms, but there packs have only 16 lengths (see `PackedBackbone.pack_multiple`), whose kernels all fit. Call
    this before the first matrix product. It does not override the user's environment variables.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def keep_freed_memory() -> None:
    """Makes glibc keep up to 64 MB of freed memory, where it returns most of it to the kernel after each layer.

    The page faults to get it back take 4 % of a forward pass on a CPU, 5 to 8 % after a shared prefix. Call this after
    the weights are loaded. It does not override the user's environment variables.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not _MALLOC_VARIABLES & {*os.environ}:
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that it accepts


@torch.inference_mode()
def measured_peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 6) -> float:
    """Measures peak FLOP/s: the fastest of `repeats` large matrix products with torch's current thread count."""
    size = 8192 if device.type == "cuda" else 1024  # as fast as larger products, in a tenth of the time
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
