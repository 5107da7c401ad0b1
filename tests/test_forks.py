"""The forks that run in the place of processes are no different from them; see `forks`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from family import descendants
from serving import wait_until

_TELLS = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["GIVEN"], sys.path[0], __name__, "torch" in sys.modules]))
print(sys.stdin.read(), file=sys.stderr)
sys.exit(3)
"""
_WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
print("waits", flush=True)
time.sleep(600)
"""


def started(folder: Path, program: str, **variables: str) -> subprocess.Popen[str]:
    script = folder / "prefill-router"
    script.write_text(program)
    return subprocess.Popen(
        [sys.executable, script, "a", "b c"],
        cwd=folder,
        env=os.environ | {"GIVEN": "x\ny"} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("variables", "is_forked"), [({}, True), ({"HF_HOME": "/elsewhere"}, False)])
def test_a_program_runs_as_always(tmp_path: Path, variables: dict[str, str], is_forked: bool) -> None:
    process = started(tmp_path, _TELLS, **variables)
    said, complained = process.communicate("asked")
    folder = str(tmp_path)
    assert json.loads(said) == [["a", "b c"], folder, "x\ny", folder, "__main__", is_forked]
    assert (complained, process.returncode) == ("asked\n", 3)


def test_what_is_ignored_may_be_handled_later(tmp_path: Path) -> None:
    """As `serve` handles SIGHUP below `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = started(tmp_path, _WAITS.replace("SIGTERM", "SIGHUP"))
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == -signal.SIGUSR1


def test_signals_reach_it_and_the_one_that_ends_it_is_told(tmp_path: Path) -> None:
    with started(tmp_path, _WAITS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.terminate()
        assert process.wait(60) == -signal.SIGUSR1


@pytest.mark.parametrize("killed", ["the process", "the fork"])
def test_neither_outlives_the_other(tmp_path: Path, killed: str) -> None:
    with started(tmp_path, _WAITS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        (fork,) = descendants(psutil.Process(process.pid))
        (fork if killed == "the fork" else process).kill()
        assert process.wait(60) == -signal.SIGKILL
        wait_until(lambda: not fork.is_running() or fork.status() == psutil.STATUS_ZOMBIE, "the fork's end")
