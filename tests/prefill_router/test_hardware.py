from __future__ import annotations

import platform
import time
from pathlib import Path

import pytest
import torch

from prefill_router.hardware import measured_peak_flops, preferred_dtype

CPUINFO = Path("/proc/cpuinfo")


def test_the_cpus_dtype_is_what_its_flags_say() -> None:
    """Where the kernel tells; elsewhere it is one of the two."""
    dtype = preferred_dtype("cpu")
    if platform.machine() == "x86_64" and CPUINFO.exists():
        flags = CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split()
        assert dtype == ("bfloat16" if {"avx512_bf16", "amx_bf16", "amx_tile"} & set(flags) else "float32")
    assert dtype in ("bfloat16", "float32")


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_must_multiply_bfloat16_natively(native: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert preferred_dtype("cuda") == dtype


def test_the_peak_is_that_of_a_timed_product() -> None:
    """Of half its size, with the same threads; within a factor of 4, for other work shares the machine."""
    peak = measured_peak_flops(torch.device("cpu"), torch.float32, repeats=2)
    a = torch.ones(1024, 1024)
    timed = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        timed.append(time.perf_counter() - started)
    assert 1 / 4 < peak / (2 * 1024**3 / min(timed)) < 4


def test_the_peak_is_of_the_type_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[torch.dtype, str]] = []

    def record(a: torch.Tensor, b: torch.Tensor) -> float:
        products.append((a.dtype, b.device.type))
        return [0.5, 0.25, 1.0][len(products) - 1]

    monkeypatch.setattr("prefill_router.hardware._product_s", record)
    assert measured_peak_flops(torch.device("cpu"), torch.bfloat16, repeats=3) == 2 * 1024**3 / 0.25
    assert products == [(torch.bfloat16, "cpu")] * 3
