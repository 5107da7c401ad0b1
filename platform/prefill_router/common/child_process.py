"""A child process that answers requests within limits of time and memory.

It isolates code that may never return, exhaust memory or crash: the caller gets a ChildDied error and continues.
"""

from __future__ import annotations

import atexit
import contextlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from prefill_router.common.errors import UserError

Handler = Callable[[Any], Any]

_START_S = 120.0  # timeout for the handler's imports, on a busy machine
_EXIT_S = 5.0  # timeout for a child to exit once its connection is closed
_PROGRAM = (  # Ctrl-C reaches all processes of a terminal: the parent decides, and closes the connection
    "import signal, sys; signal.signal(signal.SIGINT, lambda *_: None); sys.path[:] = sys.argv[2:]; "
    "from prefill_router.common.child_process import serve; serve(int(sys.argv[1]))"
)


class ChildDied(Exception):  # noqa: N818 - an event, not an error of the caller
    """The child process exited, or exceeded its time limit, during a request."""


class Child:
    """A child process that runs the handler `make(argument)`. Threads may share it; requests run one at a time.

    The process starts on the first request, and restarts after it has died. `make`, requests and answers are pickled.
    `memory_bytes` limits its address space; `start_s` limits the time that `make` may take.
    """

    def __init__(
        self,
        make: Callable[[Any], Handler],
        argument: Any,
        memory_bytes: int | None = None,
        start_s: float | None = _START_S,
    ) -> None:
        self._setup, self._start_s = (make, argument, memory_bytes), start_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        _CHILDREN.add(self)

    def ask(self, request: Any, wall_s: float | None) -> Any:
        """Returns the handler's answer to `request`; `wall_s` is its time limit.

        Raises ChildDied with the reason, UserError if the process does not start, and whatever the handler raises.
        """
        with self._lock:
            self._start()
            raised, answer = self._exchange((request, wall_s), wall_s)
        if raised:
            raise answer
        return answer

    def close(self) -> None:
        with self._lock:
            self._stop(_EXIT_S)

    def __del__(self) -> None:
        self._stop(_EXIT_S)

    def _start(self) -> None:
        if self._connection is not None:
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
            self._connection = Connection(ours.detach())
        try:
            raised, answer = self._exchange(self._setup, self._start_s)
        except ChildDied as death:
            raise UserError(
                f"cannot start a child process of {sys.executable}: it {death}: see its output on stderr"
            ) from None
        if raised:
            self._stop(_EXIT_S)
            raise answer

    def _exchange(self, message: Any, wall_s: float | None) -> tuple[bool, Any]:
        connection = self._connection
        assert connection is not None
        try:
            connection.send(message)
            if connection.poll(wall_s):
                answer: tuple[bool, Any] = connection.recv()
                return answer
        except (EOFError, OSError):
            raise ChildDied(f"ended its process: {self._stop(_EXIT_S)}") from None
        self._stop(0.0)
        raise ChildDied(f"took more than {wall_s:g} s")

    def _stop(self, wait_s: float) -> str:
        """Waits `wait_s` for the process to exit, then kills it. Returns how it exited."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return "not running"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        process.kill()
        code = process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


_CHILDREN: weakref.WeakSet[Child] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for child in list(_CHILDREN):
        child.close()


def serve(fd: int) -> None:
    """Runs in the child: answers requests until the parent exits.

    The alarm kills a child whose parent died during a request that never returns. Requests without a time limit have no
    alarm.
    """
    connection = Connection(fd)
    make, argument, memory_bytes = connection.recv()
    raised, handler = _answered(make, argument)
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    connection.send((raised, handler if raised else None))
    while not raised:
        try:
            request, wall_s = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 0 if wall_s is None else 2 * wall_s + 1)
        answer = _answered(handler, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _answered(handler: Handler, request: Any) -> tuple[bool, Any]:
    try:
        return False, handler(request)
    except Exception as error:  # raised again in the parent
        return True, error
