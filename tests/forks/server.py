"""Forks what tests start from a process that has imported what takes longest: `python server.py PID ADDRESS`.

torch and transformers take a job, a worker or a replica 7 s of CPU to import, and a run of the tests starts hundreds.
`sitecustomize.py` beside this module sends what its process is to run to the socket ADDRESS, and waits in the place of
the fork that runs it. The server ends with the process PID, and its forks with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_IMPORTED = (
    "fastapi",
    "httpx",
    "matplotlib.figure",
    "pandas",
    "pyarrow.parquet",
    "s3fs",
    "sklearn.isotonic",
    "sklearn.linear_model",
    "torch",
    "transformers.models.llama.modeling_llama",
)
_READ_BY_IMPORTS = ("HF_", "HOME", "LD_", "MALLOC_", "MKL_", "MPL", "OMP_", "TORCH_", "TRANSFORMERS_", "XDG_")


@dataclass(frozen=True)
class Program:
    """What a process is to run."""

    pid: int
    arguments: list[str]  # of Python: a script or "-m" and a module, and their arguments
    path: list[str]
    environment: dict[str, str]
    folder: str
    ignored: list[int]  # signals
    files: list[int]  # that process's numbers of its open files
    ours: tuple[int, ...]  # this process's numbers of them

    @classmethod
    def asked_for(cls, connection: socket.socket) -> Program:
        size, files, _, _ = socket.recv_fds(connection, 8, maxfds=64)
        with connection.makefile("rb") as stream:
            return cls(**json.loads(stream.read(int.from_bytes(size))), ours=tuple(files))

    def imports_the_same(self) -> bool:
        """Whether its environment is this process's in what modules read while they are imported."""
        return _read_by_imports(self.environment) == _read_by_imports(os.environ)

    def handlers(self) -> dict[signal.Signals, Any]:
        """The handlers with which Python starts."""
        defaults = dict.fromkeys(_FORWARDED, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
        return defaults | {signal.Signals(number): signal.SIG_IGN for number in self.ignored}

    def run(self) -> None:
        """Runs it as Python would have done."""
        os.setsid()
        for number, handler in self.handlers().items():
            signal.signal(number, handler)
        self._take_files()
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.path[:] = self.path
        importlib.import_module("sitecustomize")
        if self.arguments[0] == "-m":
            sys.argv[:] = ["-m", *self.arguments[2:]]
            sys.path.insert(0, self.folder)
            runpy._run_module_as_main(self.arguments[1])  # type: ignore[attr-defined]
        else:
            sys.argv[:] = self.arguments
            sys.path.insert(0, str(Path(self.arguments[0]).parent))
            runpy.run_path(self.arguments[0], run_name="__main__")

    def close(self) -> None:
        for file in self.ours:
            os.close(file)

    def _take_files(self) -> None:
        above = [os.dup2(file, 1000 + file) for file in self.ours]  # numbers that neither process uses
        self.close()
        for number, file in zip(self.files, above, strict=True):
            os.dup2(file, number)
            os.close(file)


def serve(run: int, address: Path) -> Program | None:
    """Serves until the process `run` has ended. Returns in each fork too, with its program."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers leave no zombies
        while lives(run):
            if not select.select([listener], [], [], 1.0)[0]:
                continue
            with listener.accept()[0] as connection:
                if gc.get_freeze_count() == 0:
                    _import()
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    return _watched(connection, address.parent)
    return None


def _import() -> None:
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow: a fork has no thread but one
    for name in _IMPORTED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "only a process of one thread can be forked"
    gc.collect()
    gc.freeze()  # else forks copy the pages of all objects when they collect


def _watched(connection: socket.socket, registry: Path) -> Program | None:
    """Forks the program that is asked for. Tells who asked how it ends, and kills it if who asked is killed."""
    program = Program.asked_for(connection)
    if not program.imports_the_same():
        os._exit(0)
    server = os.getppid()
    if (fork := os.fork()) == 0:
        return program
    program.close()
    ended = os.pidfd_open(fork)
    entry = registry / str(program.pid)
    entry.write_text(str(fork))
    connection.send(fork.to_bytes(4))
    while os.getppid() == server:
        ready = select.select([ended, connection], [], [], 1.0)[0]
        if ended in ready:
            connection.send(os.waitpid(fork, 0)[1].to_bytes(4))
            break
        if ready:
            break
    with suppress(ProcessLookupError):
        os.kill(fork, signal.SIGKILL)
    entry.unlink()
    os._exit(0)


def _read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_BY_IMPORTS)}


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__" and (program := serve(int(sys.argv[1]), Path(sys.argv[2]))):
    program.run()
