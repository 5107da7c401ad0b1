"""A machine with a storage, on which programs run one after another, each until it ends or dies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stderr
from io import StringIO

from crashes.life import Crash, Life
from prefill_jobs.label import decider
from prefill_router.activations import commit_segments


class Machine(ABC):
    """Stores what programs write below `uri`. At most one machine is in use at a time."""

    uri: str

    def __init__(self) -> None:
        self.num_lives = 0

    @abstractmethod
    def watched(self, life: Life | None = None) -> AbstractContextManager[None]:
        """Assigns changes of the storage to `life`, unless they belong to another life."""

    def run(self, program: Callable[[], object], dies_at: int | None = None) -> Life:
        """Runs a program as if in a new process, until it ends or dies, and returns its life."""
        self.num_lives += 1
        life = Life(self.num_lives, dies_at)
        forget()
        try:
            with self.watched(life), life.lived(), redirect_stderr(StringIO()):
                program()
        except Crash:
            assert life.death is not None
        else:
            assert life.death is None, f"the program went on after its death at: {life.death}"
        return life


def forget() -> None:
    """Clears the in-memory caches, as a new process starts without them."""
    commit_segments.read.cache_clear()
    decider._load.cache_clear()
