"""Two concurrent writers, with any interleaving of their steps: they do no harm, and at most one holds a lease."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from crashes.bucket import Bucket
from crashes.disk import Disk
from crashes.extraction import OLD, PARTS, Extraction, check_store, objects
from crashes.life import here
from crashes.machine import Machine
from crashes.process import simulate
from crashes.turns import Turns
from prefill_router import storage
from prefill_router.activations import activation_store, commit_log
from prefill_router.activations.commit_log import CommitLog
from prefill_router.activations.reuse import Sources
from prefill_router.common.errors import UserError
from prefill_router.storage import uris
from prefill_router.storage.lease import Holder, Lease

WRITERS = st.integers(0, 1)
QUICK = settings(
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Contest(RuleBasedStateMachine):
    """Two programs on one storage; Hypothesis decides when each continues, dies or restarts."""

    kind: Callable[[Path], Machine]
    most_steps = 25  # of one program in a row

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.folder = pytest.MonkeyPatch(), tempfile.TemporaryDirectory()
        simulate(self.patch)
        machine = self.kind(Path(self.folder.name) / "disk")
        if isinstance(machine, Bucket):
            self.patch.setattr(uris, "_s3", lambda: machine.filesystem)
        self.out = machine.uri
        self._watching = machine.watched()
        self._watching.__enter__()
        self._numbers = itertools.count(1)
        self.prepare()
        self.writers = [self._begun(), self._begun()]

    def prepare(self) -> None:
        """Prepares the storage before both programs start."""

    def program(self) -> None:
        """The program that both run."""
        raise NotImplementedError

    def _begun(self) -> Turns:
        return Turns(next(self._numbers), self.program)

    @rule(writer=WRITERS, num_steps=st.integers(0, 24))
    def go_on(self, writer: int, num_steps: int) -> None:
        self.writers[writer].go_on(1 + num_steps % self.most_steps)

    @rule(writer=WRITERS)
    def kill(self, writer: int) -> None:
        self.writers[writer].kill()

    @precondition(lambda self: any(each.is_over for each in self.writers))
    @rule(writer=WRITERS)
    def begin_again(self, writer: int) -> None:
        if self.writers[writer].is_over:
            self.writers[writer] = self._begun()

    @invariant()
    def all_is_well(self) -> None:
        for writer in self.writers:
            if writer.problem is not None:
                raise writer.problem
        self.check()

    def finish(self) -> None:
        """Runs both in turn to their end, one step at a time; restarts a program that has died."""
        for n in itertools.count():
            self.writers[n % 2].go_on()
            self.all_is_well()
            if all(writer.is_over for writer in self.writers):
                failed = [i for i, writer in enumerate(self.writers) if writer.death is not None]
                if not failed:
                    return
                self.writers[failed[0]] = self._begun()

    def teardown(self) -> None:
        try:
            self.finish()
            self.check_end()
        finally:
            for writer in self.writers:
                writer.kill()
            self._watching.__exit__(None, None, None)
            self.patch.undo()
            self.folder.cleanup()

    def check(self) -> None:
        """Asserts the invariants that hold after each step."""

    def check_end(self) -> None:
        """Asserts what holds after both have ended."""


class TwoExtractions(Contest):
    """Two extractions, which do not know of each other, into a store with an older shard."""

    def prepare(self) -> None:
        self.patch.setattr(commit_log, "SEGMENT_RECORDS", 2)
        self.patch.setattr(activation_store, "MAX_LISTED", 3)
        # Before Python 3.12, all threads share the lock of a cached_property; processes do not.
        self.patch.setattr(vars(Sources)["_contents"], "lock", nullcontext(), raising=False)
        Extraction(self.out)._extract([OLD])

    def program(self) -> None:
        Extraction(self.out)._extract(PARTS)

    def check(self) -> None:
        """Readers see a complete store."""
        check_store(self.out)

    def check_end(self) -> None:
        expected = undisturbed()
        assert objects(self.out) == expected[0]
        assert records(self.out) == expected[1]


def records(out: str) -> dict[str, Any]:
    opened = CommitLog.open(out)
    return {place.name: commit_log.read(out, place) for place in opened.places(np.arange(len(opened)))}


@cache
def undisturbed() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        Extraction(folder)._extract([OLD])
        Extraction(folder)._extract(PARTS)
        return objects(folder), records(folder)


class TwoHolders(Contest):
    """Two contenders for a lease, which hold it for some steps."""

    most_steps = 4

    def __init__(self) -> None:
        self.holding: set[int] = set()
        super().__init__()
        self.patch.setattr(Holder, "_has_ended", lambda holder: holder.started not in self.alive)

    @property
    def alive(self) -> set[int]:
        return {writer.number for writer in self.writers if not writer.is_over}

    def program(self) -> None:
        life = here()
        assert life is not None
        try:
            lease = Lease.acquire(self.out, "extract")
        except UserError:
            return
        self.holding.add(life.number)
        for _ in range(6):
            life.look("holds the lease")
        lease.check()
        self.holding.discard(life.number)
        lease.release()

    def check(self) -> None:
        """At most one process holds the lease."""
        assert len(self.holding & self.alive) <= 1

    def check_end(self) -> None:
        Lease.acquire(self.out, "label").release()
        assert len(storage.list_names(storage.join(self.out, "_lease"))) == 1


def contest(kind: type[Contest], machine: Callable[[Path], Machine]) -> type[Contest]:
    return type(kind.__name__, (kind,), {"kind": staticmethod(machine)})


MACHINES = pytest.mark.parametrize("machine", [Disk, lambda _folder: Bucket()], ids=["local", "s3"])


@MACHINES
def test_two_extractions_end_with_the_store_of_one(machine: Callable[[Path], Machine]) -> None:
    run_state_machine_as_test(contest(TwoExtractions, machine), settings=settings(QUICK, max_examples=15))


@MACHINES
def test_one_holds_a_lease(machine: Callable[[Path], Machine]) -> None:
    run_state_machine_as_test(contest(TwoHolders, machine), settings=settings(QUICK, max_examples=40))
