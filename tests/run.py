"""Resources that the processes of one pytest run share: files built once, and servers started once.

The first process builds a resource; the others wait at a file lock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

_STARTING_S = 180.0
_servers: list[subprocess.Popen[bytes]] = []  # referenced, else Popen warns about running processes


@dataclass(frozen=True)
class Run:
    """A pytest run of one process, or of several with xdist."""

    folder: Path
    pid: int  # of the process that ends last

    @classmethod
    def of(cls, factory: pytest.TempPathFactory) -> Run:
        folder = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            return cls(folder.parent, os.getppid())
        return cls(folder, os.getpid())

    def build(self, name: str, builder: Callable[[Path], object]) -> Path:
        """The folder `name`. `builder` fills it unless another process of the run has done so."""
        folder, finished = self.folder / name, self.folder / f".{name}.finished"
        with FileLock(self.folder / f".{name}.lock"):
            if not finished.exists():
                folder.mkdir()
                builder(folder)
                finished.touch()
        return folder

    def serve(self, name: str) -> dict[str, str]:
        """The connection details of the server `name` of `servers.py`. Starts it if needed; it ends with the run."""
        file = self.build(name, lambda folder: self._start("servers.py", name, folder / "details.json"))
        details: dict[str, str] = json.loads((file / "details.json").read_text())
        return details

    def fork(self) -> Path:
        """The socket of the server that forks processes; see `forks`."""
        name = "socket"
        return self.build("forks", lambda folder: self._start("forks/server.py", "", folder / name)) / name

    def _start(self, script: str, name: str, ready: Path) -> None:
        """Starts a server, which creates the file `ready`."""
        log = ready.parent / "log"
        command = [sys.executable, Path(__file__).parent / script, *filter(None, [name]), str(self.pid), ready]
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        _servers.append(server)
        deadline = time.monotonic() + _STARTING_S
        while not ready.exists():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not within {_STARTING_S} s: {log.read_text()}"
            time.sleep(0.05)
