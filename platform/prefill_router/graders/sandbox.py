"""The sandbox: runs code that a model wrote against tests in another process, where it can only compute.

Both processes get a temporary folder and limits of time, memory, threads, files and output. They have no network, no
other processes and no other files. See `confinement` for the mechanisms, and `harness` for the program inside and what
hostile code could still do. On a machine that cannot confine a process nothing runs, unless the caller accepts that.
"""

from __future__ import annotations

import contextlib
import itertools
import marshal
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefill_router.common.errors import UserError
from prefill_router.graders import confinement

Status = Literal["passed", "failed", "ended", "timeout", "memory", "output", "files", "threads", "broken", "killed"]
Stopped = tuple[Status, str]
_REPORTED: tuple[Status, ...] = ("passed", "failed", "memory", "broken")
_STARTED = b"+"
_HARNESS = str(Path(__file__).with_name("harness.py"))
_POLL_S = 0.05
_EXIT_POLL_S, _EXIT_GRACE_S = 0.001, 1.0
_MAX_REPORT_BYTES = 8192
_CHUNK_BYTES = 65536
MIB = 1024 * 1024


class Verdict(NamedTuple):
    """The result of one run; only the status `passed` is a pass.

    `broken` means that the tests cannot run, `killed` that something other than a limit ended the process. Neither
    says anything about the code.
    """

    status: Status
    detail: str
    output: str
    cpu_s: float


@dataclass(frozen=True)
class Sandbox:
    """The limits of one run. `wall_s` is larger than `cpu_s`, since the machine is shared.

    `unconfined` runs without the protections that the machine lacks. `site_packages` lets the code import installed
    packages. `together` runs code and tests in one process, where code can forge a verdict. Raises UserError if the
    machine lacks a protection and `unconfined` is false.
    """

    cpu_s: int = 5
    wall_s: float = 15.0
    memory_bytes: int = 512 * MIB  # of address space
    file_bytes: int = 16 * MIB
    folder_bytes: int = 64 * MIB
    num_files: int = 256
    open_files: int = 32
    output_bytes: int = MIB
    threads: int = 64
    unconfined: bool = False
    site_packages: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        lacks = confinement.lacking()
        if lacks and not self.unconfined:
            reasons = ", ".join(f"{name} ({reason})" for name, reason in lacks.items())
            raise UserError(
                f"cannot run code safely: this machine lacks {reasons}; grade on another machine, or set "
                "unconfined = true to run a model's code with your own rights"
            )

    def run(self, code: str, tests: str, entry_point: str | None = None) -> Verdict:
        """Runs `code`, then `tests` on the names that it defines. Raises UserError if the sandbox does not start."""
        secret = secrets.token_hex(16).encode()
        with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=self.unconfined) as folder:
            judged = {"tests": tests, "entry_point": entry_point, **self._confinement(folder)}
            graded = {"code": code, **self._confinement(folder)}
            with _started(folder, together=self.together) as (judge, runner):
                if runner is not judge:
                    runner.send(graded, b"")
                judge.send(judged if runner is not judge else {**judged, **graded}, secret)
                stopped = _watched(judge, runner, self)
                if stopped is None and not judge.report.strip(_STARTED) and not runner.ends_soon():
                    stopped = "ended", "the code stopped answering the tests"
                judge_ended = judge.end()
                returned, cpu_s = judge_ended if judge_ended[0] < 0 else runner.end()
        return self._verdict(judge, stopped, returned, cpu_s, secret, bytes(runner.output))

    def _confinement(self, folder: str) -> dict[str, Any]:
        lacks = confinement.lacking()
        return {
            "parent": os.getpid(),
            "limits": self._limits(),
            "paths": [(folder, confinement.SCRATCH), *confinement.readable_paths(self.site_packages)],
            "landlock": b"" if "landlock" in lacks else confinement.landlock_attributes(),
            "seccomp": b"" if "seccomp" in lacks else confinement.seccomp_program(),
            "packages": confinement.package_paths() if self.site_packages else [],
        }

    def _limits(self) -> dict[str, tuple[int, int]]:
        same = {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }
        # The code can catch the signal of the soft limit, but not that of the hard limit.
        return {"RLIMIT_CPU": (self.cpu_s, self.cpu_s + 1), **{name: (value, value) for name, value in same.items()}}

    def _verdict(
        self, run: _Run, stopped: Stopped | None, returned: int, cpu_s: float, secret: bytes, printed: bytes
    ) -> Verdict:
        if stopped is not None and not run.report:  # a slow machine: the code has not started
            return Verdict("killed", f"not started within {self.wall_s:g} s", "", cpu_s)
        output = printed[: self.output_bytes].decode(errors="replace")
        if not run.report.startswith(_STARTED):
            _, reason = _reported(bytes(run.report), secret) or self._ending(returned, cpu_s)
            raise UserError(f"the sandbox did not start: {reason} {output}".rstrip())
        said = _reported(bytes(run.report.removeprefix(_STARTED)), secret)
        status, detail = stopped or said or self._ending(returned, cpu_s)
        return Verdict(status, detail, output, cpu_s)

    def _ending(self, returned: int, cpu_s: float) -> Stopped:
        """The status and detail of a process that reported nothing."""
        if returned >= 0:
            return "ended", f"exit status {returned} before the tests finished"
        name = signal.Signals(-returned).name
        if cpu_s >= self.cpu_s or name == "SIGXCPU":
            return "timeout", f"more than {self.cpu_s} s of CPU time"
        return "killed" if name == "SIGKILL" else "ended", f"{name} before the tests finished"


def _reported(report: bytes, secret: bytes) -> Stopped | None:
    """The status and detail that the harness reports, or None if the report lacks the secret or is malformed."""
    said, _, rest = report.partition(b"\0")
    status, _, detail = rest.decode(errors="replace").partition("\0")
    if not secrets.compare_digest(said, secret) or status not in _REPORTED:
        return None
    return status, detail


class _Run:
    """A harness process and its output so far. The code's process has no `report_fd` and reports nothing."""

    def __init__(self, process: subprocess.Popen[bytes], report_fd: int | None, folder: str) -> None:
        self.process, self.report_fd, self.folder = process, report_fd, folder
        self.output, self.report = bytearray(), bytearray()
        self._cpu_s = 0.0

    def send(self, request: dict[str, Any], secret: bytes) -> None:
        data = marshal.dumps(request)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:  # the exit status says why
            stdin.write(len(data).to_bytes(8, "little") + data + secret)

    def end(self) -> tuple[int, float]:
        """Kills the process and its group. Returns its exit status and its CPU time in seconds."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self._cpu_s = usage.ru_utime + usage.ru_stime
        return self.process.returncode, self._cpu_s

    def pipes(self) -> list[tuple[int, bytearray]]:
        assert self.process.stdout is not None
        report = [] if self.report_fd is None else [(self.report_fd, self.report)]
        return [(self.process.stdout.fileno(), self.output), *report]

    def has_ended(self) -> bool:
        """Whether it has ended. Does not reap it, so that its process and group ids are not reused yet."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ends_soon(self) -> bool:
        """Whether it ends within `_EXIT_GRACE_S`."""
        deadline = time.monotonic() + _EXIT_GRACE_S
        while not (ended := self.has_ended()) and time.monotonic() < deadline:
            time.sleep(_EXIT_POLL_S)
        return ended

    def beyond(self, sandbox: Sandbox) -> Stopped | None:
        if len(self.output) > sandbox.output_bytes:
            return "output", f"more than {sandbox.output_bytes} bytes of output"
        if len(self.report) > _MAX_REPORT_BYTES:
            return "ended", "wrote to the pipe of the verdict"
        return None

    def num_threads(self) -> int:
        """The number of threads, 0 if the process has ended."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/task"))  # noqa: PTH208 - names are enough
        except OSError:
            return 0


def _watched(judge: _Run, runner: _Run, sandbox: Sandbox) -> Stopped | None:
    """Reads both outputs until the judge ends, or a process exceeds a limit that the kernel does not enforce."""
    runs = [judge] if runner is judge else [judge, runner]
    deadline = time.monotonic() + sandbox.wall_s
    next_poll = time.monotonic() + _POLL_S
    with selectors.DefaultSelector() as selector:
        for fd, into in itertools.chain.from_iterable(run.pipes() for run in runs):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ, into)
        while not judge.has_ended():
            _read(selector)
            if stopped := judge.beyond(sandbox) or runner.beyond(sandbox):
                return stopped
            if time.monotonic() > deadline:
                return "timeout", f"more than {sandbox.wall_s:g} s"
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + _POLL_S
                if _is_full(judge.folder, sandbox):
                    return "files", f"more than {sandbox.num_files} files or {sandbox.folder_bytes} bytes"
                if max(run.num_threads() for run in runs) > sandbox.threads:
                    return "threads", f"more than {sandbox.threads} threads"
        _read(selector)
    return judge.beyond(sandbox) or runner.beyond(sandbox)


def _read(selector: selectors.BaseSelector) -> None:
    """Waits for output and stores it. If all pipes are closed, the processes are about to end."""
    if not selector.get_map():
        time.sleep(_EXIT_POLL_S)
        return
    for key, _ in selector.select(_POLL_S):
        if data := os.read(key.fd, _CHUNK_BYTES):
            key.data.extend(data)
        else:
            selector.unregister(key.fd)


@contextlib.contextmanager
def _started(folder: str, *, together: bool) -> Iterator[tuple[_Run, _Run]]:
    """Starts the judge and the runner of the code, one process if `together`; both wait for their requests.

    Kills both on exit.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:

        def pipe(reads: contextlib.ExitStack) -> tuple[int, int]:
            ends = os.pipe()
            reads.callback(os.close, ends[0])
            theirs.callback(os.close, ends[1])
            return ends

        report_fd, reports = pipe(ours)
        if together:
            judge = runner = ours.enter_context(_process(folder, ["together"], [reports], report_fd))
        else:
            (judge_reads, code_writes), (code_reads, judge_writes) = pipe(theirs), pipe(theirs)
            runner = ours.enter_context(_process(folder, ["code"], [code_reads, code_writes]))
            judge = ours.enter_context(_process(folder, ["judge"], [reports, judge_reads, judge_writes], report_fd))
        theirs.close()
        yield judge, runner


@contextlib.contextmanager
def _process(folder: str, role: list[str], fds: list[int], report_fd: int | None = None) -> Iterator[_Run]:
    command = [sys.executable, "-s", "-S", "-P", "-B", "-u", "-X", "utf8", _HARNESS, *role, *map(str, fds)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=confinement.environment(folder),
        pass_fds=fds,
        start_new_session=True,
    )
    run = _Run(process, report_fd, folder)
    try:
        yield run
    finally:
        run.end()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _is_full(folder: str, sandbox: Sandbox) -> bool:
    """Whether the folder exceeds a limit. It has no subfolders, as the code cannot create any."""
    num_files = num_bytes = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            num_files += 1
            with contextlib.suppress(FileNotFoundError):
                num_bytes += 512 * entry.stat(follow_symlinks=False).st_blocks
            if num_files > sandbox.num_files or num_bytes > sandbox.folder_bytes:
                return True
    return False
