from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prefill_router.encoder.hardware import keep_freed_memory, measured_peak_flops, preferred_dtype

CPUINFO = Path("/proc/cpuinfo")


def test_the_cpus_dtype_follows_from_its_flags_and_vendor() -> None:
    """Checked on Linux, where /proc/cpuinfo has both."""
    dtype = preferred_dtype("cpu")
    if platform.machine() == "x86_64" and CPUINFO.exists():
        text = CPUINFO.read_text()
        flags = set(text.partition("flags")[2].partition("\n")[0].split())
        is_fast = "amx_tile" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in text)
        assert dtype == ("bfloat16" if is_fast else "float32")
    assert dtype in ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("has_amx", "has_avx512_bf16", "maker", "dtype"),
    [
        (True, True, "GenuineIntel", "bfloat16"),
        (False, True, "GenuineIntel", "float32"),
        (False, True, "AuthenticAMD", "bfloat16"),
        (False, False, "AuthenticAMD", "float32"),
    ],
)
@pytest.mark.parametrize("is_linux", [True, False])
def test_a_cpu_computes_in_bfloat16_where_that_is_fast(
    has_amx: bool,
    has_avx512_bf16: bool,
    maker: str,
    dtype: str,
    is_linux: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr("prefill_router.encoder.hardware._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: f"Family 6 Model 207, {maker}")
    if is_linux:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(platform, "processor", lambda: "")
    assert preferred_dtype("cpu") == dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_must_multiply_bfloat16_natively(native: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert preferred_dtype("cuda") == dtype


def test_the_peak_is_that_of_a_timed_product() -> None:
    """Compares with a product of half the size and the same threads, to a factor of 4 because the machine is shared."""
    peak = measured_peak_flops(torch.device("cpu"), torch.float32, repeats=8)
    a = torch.ones(1024, 1024)
    timed = []
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        timed.append(time.perf_counter() - started)
    assert 1 / 4 < peak / (2 * 1024**3 / min(timed)) < 4


def test_the_peak_is_measured_in_the_given_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[torch.dtype, str]] = []

    def record(a: torch.Tensor, b: torch.Tensor) -> float:
        products.append((a.dtype, b.device.type))
        return [0.5, 0.25, 1.0][len(products) - 1]

    monkeypatch.setattr("prefill_router.encoder.hardware._product_s", record)
    assert measured_peak_flops(torch.device("cpu"), torch.bfloat16, repeats=3) == 2 * 1024**3 / 0.25
    assert products == [(torch.bfloat16, "cpu")] * 3


_ALLOCATE_TWICE = """
import resource, torch
from prefill_router.encoder.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 18) for _ in range(48)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    """Counted in page faults, where malloc is glibc's: 48 MB are 12,288 pages.

    In a new process, since what this one has freed and fragmented would count too.
    """
    faults = int(subprocess.run([sys.executable, "-c", _ALLOCATE_TWICE], check=True, capture_output=True).stdout)
    assert faults < 6000 or platform.libc_ver()[0] != "glibc"


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_malloc_settings_stay(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda key, _value: set_to.append(key)))
    monkeypatch.setenv(variable, "131072")
    keep_freed_memory()
    assert set_to == []
    monkeypatch.delenv(variable)
    keep_freed_memory()
    assert set_to == [-1, -3]
