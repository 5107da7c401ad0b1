"""Ends a program at each of its moments, starts it again, and holds what comes of it against an undisturbed run."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crashes.machine import Machine

Machines = Callable[[], Machine]  # each one new and empty


class Scenario(ABC):
    """A program that writes below `out`, and the world outside it, which remembers what it did in all its lives."""

    def __init__(self, out: str) -> None:
        self.out = out

    @abstractmethod
    def run(self) -> None:
        """Runs the program from its start. After a crash it is the same command again."""

    def check(self) -> None:  # noqa: B027 - many have nothing more to say
        """Asserts what holds whenever the program is dead."""

    @abstractmethod
    def result(self) -> Any:
        """What must be the same at the end, whatever happened on the way."""


def crash_everywhere(machines: Machines, scenario: Callable[[str], Scenario], second_crashes: int = 0) -> int:
    """Crashes a scenario at every moment and restarts it; returns how many moments there are.

    After each crash, the restart crashes `second_crashes` times too, each time in a new trial and at another moment of
    a sample that is the same in every run of the tests.
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
    """Runs a scenario to its end in spite of crashes; returns whether it died at the first."""
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
