from __future__ import annotations

import os

import pytest

from prefill_router.console import say, silent_stderr


def test_only_what_is_said_outside_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    say("before")
    with silent_stderr():
        os.write(2, b"native noise\n")
        say("inside")
    say("after")
    assert capfd.readouterr().err == "before\nafter\n"


def test_an_exception_passes_and_stderr_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="boom"), silent_stderr():
        raise RuntimeError("boom")
    say("after")
    assert capfd.readouterr().err == "after\n"
