"""What the processes of one pytest run share: files that are built once, and servers that are started once.

First come builds; the others wait for it at a file lock.
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
_servers: list[subprocess.Popen[bytes]] = []  # which Popen would warn of, once nobody knows them


@dataclass(frozen=True)
class Run:
    """A pytest run, of one process or of several of xdist's."""

    folder: Path
    pid: int  # of the process that outlives all others

    @classmethod
    def of(cls, factory: pytest.TempPathFactory) -> Run:
        folder = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            return cls(folder.parent, os.getppid())
        return cls(folder, os.getpid())

    def build(self, name: str, builder: Callable[[Path], object]) -> Path:
        """The folder `name`, which `builder` fills unless another process of the run has done so."""
        folder, finished = self.folder / name, self.folder / f".{name}.finished"
        with FileLock(self.folder / f".{name}.lock"):
            if not finished.exists():
                folder.mkdir()
                builder(folder)
                finished.touch()
        return folder

    def serve(self, name: str) -> dict[str, str]:
        """What the server `name` of `servers.py` says of itself, which is started unless it runs already.

        It ends with the run.
        """
        log = self.folder / f"{name}.log"

        def start(folder: Path) -> None:
            told = folder / "told.json"
            with log.open("w") as output:
                command = [sys.executable, Path(__file__).with_name("servers.py"), name, str(self.pid), told]
                server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            _servers.append(server)
            deadline = time.monotonic() + _STARTING_S
            while not told.exists():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"not within {_STARTING_S} s: {log.read_text()}"
                time.sleep(0.05)

        told: dict[str, str] = json.loads((self.build(name, start) / "told.json").read_text())
        return told
