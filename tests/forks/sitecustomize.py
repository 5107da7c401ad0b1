"""Runs at the start of every Python with this folder on PYTHONPATH: has a fork of `server.py` take its place.

Only commands of `prefill-router` and Ray's workers ask for a fork. They start as always if the server refuses or has
ended, as everything else does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_FORWARDED = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def _asks() -> bool:
    match sys.orig_argv:
        case [_, "-m", "prefill_jobs", *_]:
            return True
        case [_, script, *_]:
            return Path(script).name in ("prefill-router", "default_worker.py")
    return False


def _let_fork(server: socket.socket) -> None:
    """Lets a fork take this process's place, waits for its end, and ends as it did. Returns if it is refused."""
    files = [file for file in range(256) if _is_inherited(file)]
    ignored = [number for number in _FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    program = {
        "pid": os.getpid(),
        "arguments": sys.orig_argv[1:],
        "path": sys.path,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "ignored": ignored,
        "files": files,
    }
    asked = json.dumps(program).encode()
    socket.send_fds(server, [len(asked).to_bytes(8)], files)
    server.sendall(asked)
    if not (fork := int.from_bytes(server.recv(4))):
        return
    with Path(os.devnull).open("r+b") as nothing:
        for file in files:
            os.dup2(nothing.fileno(), file)
    for number in _FORWARDED:
        signal.signal(number, lambda number, _: os.kill(fork, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    told = server.recv(4)  # nothing if the run of the tests is over
    status = os.waitstatus_to_exitcode(int.from_bytes(told)) if told else -signal.SIGKILL
    if -status in _FORWARDED:
        signal.signal(-status, signal.SIG_DFL)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:
        return False


def _run_next() -> None:
    """Runs the `sitecustomize.py` of the next folder that has one."""
    sys.path.remove(str(Path(__file__).parent))
    spec = PathFinder.find_spec("sitecustomize")
    if spec and spec.loader:
        sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sitecustomize"])


if _asks() and "TEST_FORKS" in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    with socket.socket(socket.AF_UNIX) as server, suppress(FileNotFoundError, ConnectionRefusedError):
        server.connect(os.environ["TEST_FORKS"])
        _let_fork(server)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
_run_next()
