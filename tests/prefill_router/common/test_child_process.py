"""A child process outlives the signals of its terminal: its parent ends it."""

from __future__ import annotations

import operator
import os
import signal

from prefill_router.common.child_process import Child


def test_an_interrupt_of_the_terminal_ends_no_child() -> None:
    child = Child(operator.itemgetter, 0)
    assert child.ask(["before"], 60) == "before"
    assert child._process is not None
    os.kill(child._process.pid, signal.SIGINT)
    assert child.ask(["after"], 60) == "after"
    child.close()
