"""Graders in a process of their own, which is ended where an answer takes too long.

A schema, a pattern or a verifier that others wrote may never come to an end with the answer that a model gives, and
nothing inside a process can break off all that it may be busy with.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from prefill_router.errors import UserError
from prefill_router.graders.grade import Grade, Row, missing
from prefill_router.graders.registry import Grader

WALL_S = 10.0  # for one answer
_END_S = 5.0  # for a process that sees nobody at the other end
_START_S = 120.0  # to import what a grader needs, on a machine that is busy


class BoundedGrader:
    """Grades as its `grader` does, and says that an answer is not graded where that takes more than `wall_s`.

    Threads take turns. It pickles as its grader does; each copy starts a process of its own when it needs one.
    """

    def __init__(self, grader: Grader, wall_s: float = WALL_S) -> None:
        self.grader, self.wall_s = grader, wall_s
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._turn = threading.Lock()

    @property
    def options(self) -> Mapping[str, Any]:
        return self.grader.options

    def __call__(self, answer: str, row: Row) -> Grade:
        """The grade of one answer. Raises UserError where the grader does."""
        answered = self._ask(answer, row)
        return answered if isinstance(answered, Grade) else missing(f"{self.grader.spec} {answered}")

    def unfit(self, row: Row) -> str | None:
        """Why no answer to a row can be graded; None where one can."""
        answered = self._ask(None, row)
        assert not isinstance(answered, Grade)
        return answered if answered is None else str(answered)

    def _ask(self, answer: str | None, row: Row) -> Grade | str | None:
        with self._turn:
            connection = self._started()
            try:
                connection.send((answer, dict(row)))
                if not connection.poll(self.wall_s):
                    self._end(wait_s=0.0)
                    return f"took more than {self.wall_s:g} s"
                answered: Grade | str | UserError | None = connection.recv()
            except (EOFError, OSError):
                return f"ended its process: {self._end()}"
        if isinstance(answered, UserError):
            raise answered
        return answered

    def _started(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.grader, self.wall_s), daemon=True)
            self._process.start()
            theirs.close()
            try:
                if not connection.poll(_START_S):
                    raise UserError(f"grader {self.grader.spec}: its process did not start within {_START_S:g} s")
                connection.recv()
            except EOFError:
                raise UserError(f"grader {self.grader.spec}: its process did not start: {self._end()}") from None
            self._connection = connection
        return self._connection

    def _end(self, wait_s: float = _END_S) -> str:
        """Ends the process, if there is one and it does not end by itself, and says how it has ended."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return "there was none"
        process.join(wait_s)
        process.kill()
        process.join()
        code = process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def close(self) -> None:
        with self._turn:
            self._end()

    def __del__(self) -> None:
        self._end()

    def __reduce__(self) -> tuple[type[BoundedGrader], tuple[Grader, float]]:
        return BoundedGrader, (self.grader, self.wall_s)


def bounded(grader: Grader) -> Grader | BoundedGrader:
    """The grader, with a limit of time unless it keeps one itself, or asks a judge that is in this process."""
    return grader if grader.keeps_time or "ask" in grader.options else BoundedGrader(grader)


def _serve(connection: Connection, grader: Grader, wall_s: float) -> None:
    """The child: answers until its parent has gone, and is ended by the kernel where its parent went meanwhile."""
    connection.send(None)
    while True:
        try:
            answer, row = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * wall_s + 1)
        answered: Grade | str | UserError | None
        try:
            answered = grader.unfit(row) if answer is None else grader(answer, row)
        except UserError as error:
            answered = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answered)
