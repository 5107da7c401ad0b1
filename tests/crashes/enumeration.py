"""Crashes a program at each crash point, restarts it, and compares the result with that of an undisturbed run."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crashes.machine import Machine

Machines = Callable[[], Machine]  # returns a new, empty machine


class Scenario(ABC):
    """A program that writes below `out`, and a record of its effects on the outside over all its runs."""

    def __init__(self, out: str) -> None:
        self.out = out

    @abstractmethod
    def run(self) -> None:
        """Runs the program from its start, as after a crash: with the same command."""

    def check(self) -> None:  # noqa: B027 - optional
        """Asserts the invariants that hold after each crash."""

    @abstractmethod
    def result(self) -> Any:
        """The final state, which must not depend on crashes."""


def crash_everywhere(machines: Machines, scenario: Callable[[str], Scenario], second_crashes: int = 0) -> int:
    """Crashes a scenario at each of its moments and restarts it; returns the number of moments.

    For each moment, `second_crashes` more trials crash the restart too, at moments from a fixed sample.
    """
    calm = scenario((machine := machines()).uri)
    num_moments = len(machine.run(calm.run).moments)
    expected = calm.result()
    for at in itertools.count(1):
        if not _dies(machines(), scenario, expected, at):
            assert at > 1, "the program changed nothing"
            return at - 1
        for nth in range(second_crashes):
            _dies(machines(), scenario, expected, at, 1 + (at * (nth + 1) * 7919 + nth) % num_moments)
    raise AssertionError("unreachable")


def _dies(machine: Machine, scenario: Callable[[str], Scenario], expected: Any, *crashes: int) -> bool:
    """Runs a scenario to its end, with crashes at these moments; returns whether it reached the first one."""
    trial, deaths = scenario(machine.uri), []
    for at in crashes:
        life = machine.run(trial.run, at)
        if life.death is None:
            break
        deaths.append(f"{at} ({life.death})")
        with _explained(deaths):
            trial.check()
    else:
        with _explained(deaths):
            machine.run(trial.run)
    with _explained(deaths):
        assert trial.result() == expected
    return bool(deaths)


@contextmanager
def _explained(deaths: list[str]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"after a crash at moment {', then at '.join(deaths)}")
        raise
