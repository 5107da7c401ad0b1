"""Runs a job of `prefill-router` as a process with its own Ray, which tests observe and kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from family import family
from serving import wait_until

REPOSITORY = Path(__file__).parents[2]
_SOURCES = [str(REPOSITORY / root) for root in ("platform", "jobs", "serve")]


class Job:
    command: str

    def __init__(
        self, log: Path, /, *, saboteur: bool = False, slow_s: float = 0.0, reads: int = -1, **options: object
    ) -> None:
        before = os.environ.get("PYTHONPATH", "")
        paths = [before, *([str(Path(__file__).parent / "saboteur")] if saboteur else []), *_SOURCES]
        arguments = [sys.executable, "-m", "prefill_jobs", self.command]
        for key, value in options.items():
            arguments += [f"--{key.replace('_', '-')}", str(value)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "SABOTEUR_SLOW_S": str(slow_s)}
        environment["SABOTEUR_READS"] = str(reads)
        environment.pop("RAY_ADDRESS", None)  # the address of this process's Ray
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=output, env=environment, start_new_session=True, text=True
            )

    def wait(self, timeout_s: float) -> str:
        """Waits for success, and returns the job's output."""
        out = self.end(timeout_s)
        assert self.process.returncode == 0, self.log.read_text()
        return out

    def end(self, timeout_s: float) -> str:
        """Waits for the end, and returns the job's output."""
        with self.process:
            return self.process.communicate(timeout=timeout_s)[0]

    def kill(self) -> None:
        """Kills the driver only; its Ray has to notice."""
        self.process.send_signal(signal.SIGKILL)
        self.end(300)

    def kill_all(self) -> None:
        """Kills the driver and all its descendants."""
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.end(300)

    def kill_all_after(self, has_begun: Callable[[], bool]) -> None:
        """Calls `kill_all` once the job has begun its work."""
        wait_until(lambda: has_begun() or self.process.poll() is not None, "a beginning")
        assert self.process.poll() is None, self.log.read_text()
        self.kill_all()

    def workers(self) -> list[int]:
        """The processes of the job's encoder actors."""
        return [pid for pid in self.family() if _title(pid).startswith("ray::MapWorker")]

    def starts_ray(self) -> bool:
        return any("gcs_server" in _title(pid) for pid in self.family())

    def family(self) -> list[int]:
        """The driver and all processes started by it or its Ray."""
        return family(self.process.pid)

    def pss_bytes(self) -> int:
        """Memory of the family; shared memory counts once."""
        return sum(_pss_bytes(pid) for pid in self.family())


class ExtractJob(Job):
    command = "extract"


class LabelJob(Job):
    command = "label"


class CollectJob(Job):
    command = "collect"


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0")
    except OSError:
        return ""


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
