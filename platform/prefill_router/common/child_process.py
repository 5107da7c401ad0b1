"""A process of its own that answers requests, within limits of time and memory.

What is asked there may never come to an end, take all memory or end its process: who asks is told so, and goes on.
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

_START_S = 120.0  # to import what a handler needs, on a machine that is busy
_END_S = 5.0  # for a process that sees nobody at the other end
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from prefill_router.common.child_process import serve; serve(int(sys.argv[1]))"
)


class ChildDied(Exception):  # noqa: N818 - what happened, of a process
    """The process took too long, or ended, over a request."""


class Child:
    """Answers as the handler does that `make` makes of `argument`. Threads take turns.

    The process is started when it is needed, and again after it has ended. `make`, requests and answers are pickled.
    `memory_bytes` bounds its address space.
    """

    def __init__(self, make: Callable[[Any], Handler], argument: Any, memory_bytes: int | None = None) -> None:
        self._about = (make, argument, memory_bytes)
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        _CHILDREN.add(self)

    def ask(self, request: Any, wall_s: float) -> Any:
        """Raises ChildDied, with the reason, what the handler raises, and UserError where no process starts."""
        with self._turn:
            self._start()
            raised, answer = self._exchange((request, wall_s), wall_s)
        if raised:
            raise answer
        return answer

    def close(self) -> None:
        with self._turn:
            self._end(_END_S)

    def __del__(self) -> None:
        self._end(_END_S)

    def _start(self) -> None:
        if self._connection is not None:
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
            self._connection = Connection(ours.detach())
        try:
            raised, answer = self._exchange(self._about, _START_S)
        except ChildDied as death:
            raise UserError(f"a process of {sys.executable} does not start: it {death}: see what it printed") from None
        if raised:
            self._end(_END_S)
            raise answer

    def _exchange(self, message: Any, wall_s: float) -> tuple[bool, Any]:
        connection = self._connection
        assert connection is not None
        try:
            connection.send(message)
            if connection.poll(wall_s):
                answer: tuple[bool, Any] = connection.recv()
                return answer
        except (EOFError, OSError):
            raise ChildDied(f"ended its process: {self._end(_END_S)}") from None
        self._end(0.0)
        raise ChildDied(f"took more than {wall_s:g} s")

    def _end(self, wait_s: float) -> str:
        """Ends the process, if there is one and it does not end by itself, and says how it has ended."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return "there was none"
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
    """The child: answers until its parent has gone. Where it has gone meanwhile, the kernel ends the child."""
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
        signal.setitimer(signal.ITIMER_REAL, 2 * wall_s + 1)
        answer = _answered(handler, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _answered(handler: Handler, request: Any) -> tuple[bool, Any]:
    try:
        return False, handler(request)
    except Exception as error:  # whatever it is, who asked should know
        return True, error
