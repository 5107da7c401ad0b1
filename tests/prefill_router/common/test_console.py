from __future__ import annotations

import os

import pytest

from prefill_router.common.console import said_if_slow, say, silent_stderr


def test_native_output_is_discarded_inside_the_block_only(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before\n")
    with silent_stderr():
        os.write(2, b"inside\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_an_exception_passes_and_stderr_is_restored(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="boom"), silent_stderr():
        raise RuntimeError("boom")
    say("after")
    assert capfd.readouterr().err == "after\n"


def test_slow_work_is_announced_even_while_stderr_is_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    with said_if_slow("slow", after_s=0.0), silent_stderr():
        os.write(2, b"noise\n")
        while not (said := capfd.readouterr().err):
            pass
    assert said == "slow\n"
    with said_if_slow("slow", after_s=60.0):
        os.write(2, b"quick\n")
    assert capfd.readouterr().err == "quick\n"
