"""Graders with a time limit: each runs in a child process, which is killed if one answer takes too long.

A schema, a pattern or a verifier may run for ever on some answer, and no mechanism inside a process can interrupt
everything it may be doing.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

from prefill_router.common.child_process import Child, ChildDied
from prefill_router.graders.grade import Grade, Row, missing
from prefill_router.graders.registry import Grader

WALL_S = 10.0  # for one answer


class BoundedGrader:
    """Runs `grader` in a child process. The grade of an answer that takes more than `wall_s` is missing.

    Thread-safe: calls take turns. Picklable if the grader is. Equal graders in a process share one child process.
    """

    def __init__(self, grader: Grader, wall_s: float = WALL_S) -> None:
        self.grader, self.wall_s = grader, wall_s
        self._child = _child_of(pickle.dumps(grader), tuple(sys.path))

    @property
    def options(self) -> Mapping[str, Any]:
        return self.grader.options

    def __call__(self, answer: str, row: Row) -> Grade:
        """Grades one answer. Raises UserError if the grader does."""
        try:
            grade: Grade = self._child.ask((answer, dict(row)), self.wall_s)
        except ChildDied as death:
            return missing(f"{self.grader.spec} {death}")
        return grade

    def unfit(self, row: Row) -> str | None:
        """The reason why no answer to a row can be graded, or None."""
        try:
            reason: str | None = self._child.ask((None, dict(row)), self.wall_s)
        except ChildDied as death:
            return f"{self.grader.spec} {death}"
        return reason

    def close(self) -> None:
        self._child.close()

    def __reduce__(self) -> tuple[type[BoundedGrader], tuple[Grader, float]]:
        return BoundedGrader, (self.grader, self.wall_s)


@functools.lru_cache(maxsize=8)
def _child_of(pickled_grader: bytes, _path: tuple[str, ...]) -> Child:
    """The child process of a grader. It finds the grader's module on the current `sys.path`."""
    return Child(_grading, pickle.loads(pickled_grader))


def bounded(grader: Grader) -> Grader | BoundedGrader:
    """Adds a time limit to a grader, unless it has its own or calls a judge in this process."""
    return grader if grader.keeps_time or "ask" in grader.options else BoundedGrader(grader)


def _grading(grader: Grader) -> Callable[[tuple[str | None, Row]], Grade | str | None]:
    """Runs in the child process: grades an answer or, if it is None, checks whether the row is unfit."""

    def graded(asked: tuple[str | None, Row]) -> Grade | str | None:
        answer, row = asked
        return grader.unfit(row) if answer is None else grader(answer, row)

    return graded
