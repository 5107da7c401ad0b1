from __future__ import annotations

import os

import pytest

from prefill_router.common import console
from prefill_router.common.console import LiveLine, doing, live, say, silent_stderr


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


def test_what_is_said_is_kept_even_while_stderr_is_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    with silent_stderr(), silent_stderr():
        os.write(2, b"noise\n")
        say("said")
    assert capfd.readouterr().err == "said\n"


def test_slow_work_is_said_from_another_thread(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_SAID_AFTER_S", 0.0)
    with live("load"), doing("load: the weights"), silent_stderr():
        while not (said := capfd.readouterr().err):
            pass
    assert said.startswith("load: the weights (")


class Screen:
    """A stderr and a clock."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.now, self.written = 0.0, ""
        self.line = LiveLine(self.write, lambda: is_terminal, lambda: self.now)

    def write(self, text: str) -> None:
        self.written += text

    def pass_s(self, seconds: int) -> None:
        for _ in range(2 * seconds):
            self.now += 0.5
            self.line.tick()

    def read(self) -> list[str]:
        written, self.written = self.written, ""
        return written.splitlines()


def test_in_a_pipe_each_long_task_is_said_and_nobody_waits_ten_seconds() -> None:
    screen = Screen(is_terminal=False)
    with screen.line.doing("load"):
        screen.pass_s(2)
        assert screen.read() == []
        screen.pass_s(1)
        assert screen.read() == ["load (3 s)"]
        screen.pass_s(16)
        assert screen.read() == ["load (10 s)", "load (17 s)"]
        with screen.line.doing(lambda: "read: 7/10"):
            screen.pass_s(3)
            assert screen.read() == ["read: 7/10"]
        screen.line.say("done")
        for _ in range(10):  # tasks that are short each, and together are not
            with screen.line.doing("step"):
                screen.pass_s(2)
        assert screen.read() == ["done", "step (1 s)", "step (2 s)"]
        with screen.line.doing(""):
            screen.pass_s(60)
        assert screen.read() == []
    screen.pass_s(60)
    assert screen.read() == []


def test_on_a_terminal_one_line_is_rewritten_and_makes_way() -> None:
    screen = Screen(is_terminal=True)
    with screen.line.doing("load"):
        screen.pass_s(2)
        screen.line.say("warning: slow")
    clear = "\r\033[K"
    assert screen.written == f"{clear}load (1 s){clear}load (2 s){clear}load (2 s){clear}warning: slow\n"
    with screen.line.doing("x" * 500):
        screen.pass_s(1)
    assert screen.written.endswith(f"{clear}{'x' * 79}{clear}")  # the width of a terminal that has none
