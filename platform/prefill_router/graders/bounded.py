"""Graders in a process of their own, which is ended where an answer takes too long.

A schema, a pattern or a verifier that others wrote may never come to an end with the answer that a model gives, and
nothing inside a process can break off all that it may be busy with.
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
    """Grades as its `grader` does, and says that an answer is not graded where that takes more than `wall_s`.

    Threads take turns. It pickles as its grader does. Equal graders of a process share the one that grades for them.
    """

    def __init__(self, grader: Grader, wall_s: float = WALL_S) -> None:
        self.grader, self.wall_s = grader, wall_s
        self._child = _child_of(pickle.dumps(grader), tuple(sys.path))

    @property
    def options(self) -> Mapping[str, Any]:
        return self.grader.options

    def __call__(self, answer: str, row: Row) -> Grade:
        """The grade of one answer. Raises UserError where the grader does."""
        try:
            grade: Grade = self._child.ask((answer, dict(row)), self.wall_s)
        except ChildDied as death:
            return missing(f"{self.grader.spec} {death}")
        return grade

    def unfit(self, row: Row) -> str | None:
        """Why no answer to a row can be graded; None where one can."""
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
    """The process that finds a grader's module along the path as it is now."""
    return Child(_grading, pickle.loads(pickled_grader))


def bounded(grader: Grader) -> Grader | BoundedGrader:
    """The grader, with a limit of time unless it keeps one itself, or asks a judge that is in this process."""
    return grader if grader.keeps_time or "ask" in grader.options else BoundedGrader(grader)


def _grading(grader: Grader) -> Callable[[tuple[str | None, Row]], Grade | str | None]:
    """In the process: grades an answer, or, where there is none, says why a row is unfit."""

    def graded(asked: tuple[str | None, Row]) -> Grade | str | None:
        answer, row = asked
        return grader.unfit(row) if answer is None else grader(answer, row)

    return graded
