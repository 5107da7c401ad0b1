from __future__ import annotations

import os

import pytest

from prefill_router.console import say, silent_stderr


def test_native_noise_is_heard_outside_alone(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before\n")
    with silent_stderr():
        os.write(2, b"inside\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_an_exception_passes_and_stderr_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="boom"), silent_stderr():
        raise RuntimeError("boom")
    say("after")
    assert capfd.readouterr().err == "after\n"
