"""Programs that share a storage and take turns: each waits for permission before each change and each read."""

from __future__ import annotations

import threading
from collections.abc import Callable

from crashes.life import Crash, Life
from crashes.machine import forget
from prefill_router.common.errors import UserError

_PATIENCE_S = 60.0  # time limit of one step, on a busy machine


class Turns(Life):
    """A life in a thread of its own, which continues on command."""

    def __init__(self, number: int, program: Callable[[], object]) -> None:
        super().__init__(number)
        self.problem: BaseException | None = None
        self._program, self._is_over = program, False
        self._leave, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self._await()

    @property
    def is_over(self) -> bool:
        return self._is_over

    def reach(self, moment: str) -> None:
        self.look(moment)
        super().reach(moment)

    def look(self, what: str) -> None:  # noqa: ARG002 - the signature of Life
        if self.death is None:
            self._waits.release()
            self._leave.acquire()
        if self.death is not None:
            raise Crash(self.death)

    def go_on(self, num_steps: int = 1) -> None:
        """Lets the program take `num_steps` steps, unless it ends before."""
        while not self.is_over and num_steps > 0:
            num_steps -= 1
            self._leave.release()
            self._await()

    def kill(self) -> None:
        """Kills the program before its next step."""
        if not self.is_over:
            self.death = "killed"
            self._leave.release()
            self._await()

    def _await(self) -> None:
        assert self._waits.acquire(timeout=_PATIENCE_S), "a step did not end"
        if self.is_over:
            self._thread.join()

    def _live(self) -> None:
        forget()
        try:
            with self.lived():
                self._program()
        except Crash:
            pass
        except UserError as error:  # the program gives up
            self.death = str(error)
        except BaseException as error:
            self.problem = error
        finally:
            self._is_over = True
            self._waits.release()
