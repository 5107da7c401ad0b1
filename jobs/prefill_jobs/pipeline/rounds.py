"""`pipeline --every 6h`: runs the pipeline again and again in one process, until it is stopped."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable

from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError, one_line


def run_every(run: Callable[[], object], every_s: float) -> None:
    """Calls `run` at once, and then `every_s` seconds after each start, or at once if a round took longer.

    A round that fails is reported, and the next one runs all the same. Returns on SIGTERM and SIGINT, which also end a
    round in progress: the next process resumes it.
    """
    try:
        while True:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # in each round: Ray sets a handler of its own
            started = time.monotonic()
            _run(run)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            with doing(""):
                time.sleep(max(0.0, started + every_s - time.monotonic()))
    except (KeyboardInterrupt, SystemExit):
        say("pipeline: stopped")


def _run(run: Callable[[], object]) -> None:
    try:
        run()
    except (UserError, OSError) as error:
        say(f"pipeline: round failed, the next one follows on schedule: {one_line(error)}")
    except Exception:
        traceback.print_exc()
        say("pipeline: round failed, the next one follows on schedule")
