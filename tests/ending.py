"""Ends processes that tests started."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def ended(process: subprocess.Popen[Any], number: signal.Signals = signal.SIGTERM) -> int:
    """Signals the process to end, kills it after 300 s, and returns its exit status."""
    process.send_signal(number)
    try:
        return process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
