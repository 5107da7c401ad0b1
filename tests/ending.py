"""The end of a process that tests started."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def ended(process: subprocess.Popen[Any], number: signal.Signals = signal.SIGTERM) -> int:
    """Its exit status: it is told to end, and killed if it does not, so that it disturbs no other test."""
    process.send_signal(number)
    try:
        return process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
