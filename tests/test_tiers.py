"""`make test` runs every test without a reason to be slow; `make test-all`, which CI runs, runs all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from scheduling import STARTS_RAY
from selection import COLLECTED, LACKING

ROOT = Path(__file__).parents[1]


def recipe(target: str) -> str:
    """The commands of a Makefile target, with variables expanded."""
    makefile = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) :?\??= ?(.*)$", makefile, re.M))
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert found, target
    text = found[1]
    while text != (text := re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)):
        pass
    return text


def test_every_file_is_collected(request: pytest.FixtureRequest) -> None:
    """In the folders given to this run, or in all."""
    below = [Path(str(argument).partition("::")[0]).resolve() for argument in request.config.args]
    files = {file for folder in below for file in ([folder] if folder.is_file() else folder.rglob("test_*.py"))}
    assert Path(__file__) in files
    assert files == set(request.config.stash[COLLECTED])


def test_ci_has_the_programs_that_tests_drive(request: pytest.FixtureRequest) -> None:
    """Other machines may lack them; marks deselect the tests there."""
    needed = {"browser", "prometheus"} if "CI" in os.environ else set()
    assert not request.config.stash[LACKING] & needed


def test_a_slow_test_says_why(request: pytest.FixtureRequest) -> None:
    marks = [mark for item in request.session.items for mark in item.iter_markers("slow")]
    assert all(len(mark.args) == 1 and isinstance(mark.args[0], str) and mark.args[0] for mark in marks)


def test_files_that_start_a_ray_are_there() -> None:
    assert all((ROOT / path).exists() for path in STARTS_RAY)


def test_all_leaves_out_nothing_and_is_what_ci_runs() -> None:
    assert "pytest" in recipe("test-all")
    assert not re.search(r" (-m|-k|--ignore|--deselect)", recipe("test-all"))
    assert recipe("test").strip() == f'{recipe("test-all").strip()} -m "not slow"'
    assert (ROOT / ".ci" / "run").read_text().endswith("\nmake test-all\n")
