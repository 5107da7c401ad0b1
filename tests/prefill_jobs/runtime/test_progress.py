"""What is said of a task's progress. When it is said, `console` decides; how long the rest takes, `task_pace`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

from prefill_jobs.runtime import progress
from prefill_jobs.runtime.progress import Progress, counted
from prefill_router.encoder.prefill_work import Work


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], str]]:
    """The lines of the tasks that are shown."""
    shown: list[Callable[[], str]] = []

    def doing(line: Callable[[], str]) -> AbstractContextManager[None]:
        shown.append(line)
        return nullcontext()

    monkeypatch.setattr(progress, "doing", doing)
    return shown


def test_items_are_counted_as_they_come(lines: list[Callable[[], str]]) -> None:
    items = counted(iter("abc"), "probe", 3, "columns")
    assert next(items) == "a"
    assert lines[0]().startswith("probe: 1/3 columns · ")
    assert list(items) == ["b", "c"]
    assert lines[0]().startswith("probe: 3/3 columns · ")


def test_before_the_first_rows_it_says_what_the_workers_do(
    lines: list[Callable[[], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("extract", 30).shown() as extraction:
        extraction.skip(10)
        assert lines[0]().startswith("extract: 10/30 prompts · 10 done before · starting workers (")
        extraction.start = lambda: "loading the encoder"
        assert "loading the encoder (" in lines[0]()
        extraction.add(10, Work(prompts=10, tokens=70, flops=1.0, seconds=1.0))
        assert lines[0]() == "extract: 20/30 prompts · 10 done before"
    assert capsys.readouterr().err == ""  # too short to be worth a line
